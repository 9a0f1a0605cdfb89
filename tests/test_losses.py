"""The linear losses against dense float64, values and gradients, alone and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError
from jaxhybrid.losses import alignment_loss, linear_cross_entropy, linear_kl, next_token_targets
from jaxhybrid.model.head import Head
from jaxhybrid.model.partition import batch_sharding, make_mesh

B, T, D = 8, 7, 12


def draw(vocab_student, vocab_teacher, seed=0, teacher_width=D):
    rng = np.random.default_rng(seed)
    arrays = {
        "student": rng.normal(size=(B, T, D)),
        "student_head": rng.normal(size=(D, vocab_student)),
        "teacher": rng.normal(size=(B, T, teacher_width)),
        "teacher_head": rng.normal(size=(teacher_width, vocab_teacher)),
        "mask": (rng.random((B, T)) < 0.7).astype(np.float64),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def dense_kl(student, student_head, teacher, teacher_head, mask, words, caps=(None, None)):
    """Values and the student's gradients in float64, with nothing clever."""
    student, student_head, teacher, teacher_head = (
        np.asarray(x, np.float64) for x in (student, student_head, teacher, teacher_head)
    )
    z, w = student @ student_head[:, :words], teacher @ teacher_head[:, :words]
    z, w = (x if cap is None else cap * np.tanh(x / cap) for x, cap in zip((z, w), caps))
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    log_p = w - np.log(np.exp(w).sum(-1, keepdims=True))
    p = np.exp(log_p)
    value = ((p * (log_p - log_q)).sum(-1) * mask).sum()
    dz = (np.exp(log_q) - p) * mask[..., None]
    if caps[0] is not None:
        dz *= 1 - (z / caps[0]) ** 2
    head_gradient = np.zeros(student_head.shape)
    head_gradient[:, :words] = np.einsum("btd,bts->ds", student, dz)
    return value, dz @ student_head[:, :words].T, head_gradient


@pytest.mark.parametrize(("vocab_student", "vocab_teacher", "words"), [(50, 50, 50), (37, 64, 37), (64, 50, 41)])
@pytest.mark.parametrize(("chunk", "caps"), [(5, (None, None)), (16, (3.0, 2.0)), (1000, (None, 2.0))])
def test_linear_kl_equals_dense_float64(vocab_student, vocab_teacher, words, chunk, caps):
    x = draw(vocab_student, vocab_teacher, teacher_width=9)

    def loss(student, head):
        heads = Head(head, caps[0]), Head(x["teacher_head"], caps[1])
        return linear_kl(student, heads[0], x["teacher"], heads[1], x["mask"], vocab_size=words, chunk_tokens=chunk)

    value, (hidden_gradient, head_gradient) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["student"], x["student_head"])
    expected = dense_kl(**x, words=words, caps=caps)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(loss(x["student"], x["student_head"]), expected[0], rtol=1e-5)
    np.testing.assert_allclose(hidden_gradient, expected[1], atol=1e-5)
    np.testing.assert_allclose(head_gradient, expected[2], atol=2e-5)
    assert np.all(np.asarray(head_gradient)[:, words:] == 0)


def test_linear_kl_of_equal_models_is_zero():
    x = draw(33, 33)
    own = x["student"], Head(x["student_head"])
    assert abs(linear_kl(*own, *own, x["mask"])) < 1e-4


def test_linear_kl_scales_its_gradient():
    x = draw(20, 20)
    rest = (Head(x["student_head"]), x["teacher"], Head(x["teacher_head"]), x["mask"])
    plain = jax.grad(lambda h: linear_kl(h, *rest))(x["student"])
    scaled = jax.grad(lambda h: 0.25 * linear_kl(h, *rest))(x["student"])
    np.testing.assert_allclose(0.25 * plain, scaled, rtol=1e-6)


def test_linear_kl_never_holds_the_batch_of_logits():
    """The compiled program has no buffer as large as B x T x S floats."""
    tokens, width, words = 4096, 8, 3000
    shapes = [(1, tokens, width), (width, words), (1, tokens, width), (width, words), (1, tokens)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(student, student_head, teacher, teacher_head, mask):
        return linear_kl(student, Head(student_head, 30.0), teacher, Head(teacher_head, 30.0), mask, chunk_tokens=128)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    temporary = gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporary < tokens * words * 4 / 4


def test_vocabulary_larger_than_a_head_is_refused():
    x = draw(20, 30)
    heads = Head(x["student_head"]), Head(x["teacher_head"])
    with pytest.raises(ConfigError, match=r"vocab_size 25 .* student has 20"):
        linear_kl(x["student"], heads[0], x["teacher"], heads[1], x["mask"], vocab_size=25)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_cross_entropy_equals_dense(cap):
    x = draw(29, 29)
    targets = np.random.default_rng(1).integers(0, 29, (B, T))

    def dense(hidden, head):
        logits = hidden @ head
        log_q = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
        return -jnp.sum(jnp.take_along_axis(log_q, targets[..., None], -1)[..., 0] * x["mask"])

    def ours(hidden, head):
        return linear_cross_entropy(hidden, Head(head, cap), targets, x["mask"], chunk_tokens=10)

    expected = jax.value_and_grad(dense, (0, 1))(x["student"], x["student_head"])
    actual = jax.value_and_grad(ours, (0, 1))(x["student"], x["student_head"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), actual, expected)


def test_bfloat16_loss_is_near_float32():
    x = draw(64, 64)
    low = {name: jnp.asarray(value, jnp.bfloat16) for name, value in x.items() if name != "mask"}

    def loss(student, head, other, other_head):
        return linear_kl(student, Head(head), other, Head(other_head), x["mask"])

    names = ("student", "student_head", "teacher", "teacher_head")
    expected = jax.value_and_grad(loss, (0, 1))(*(x[n] for n in names))
    actual = jax.value_and_grad(loss, (0, 1))(*(low[n] for n in names))
    np.testing.assert_allclose(actual[0], expected[0], rtol=2e-2)
    for a, b in zip(actual[1], expected[1]):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_sharded_losses_equal_one_device():
    x = draw(50, 50)
    segments = np.ones((B, T), np.int32)
    segments[:, 4:] = 2
    tokens = np.random.default_rng(2).integers(0, 50, (B, T))

    def loss(student, head, teacher, teacher_head, mask, tokens, segments):
        targets, own = next_token_targets(tokens, segments)
        own_head = Head(head, 3.0)
        kl = linear_kl(student, own_head, teacher, Head(teacher_head, 2.0), mask, chunk_tokens=4)
        return kl + linear_cross_entropy(student, own_head, targets, own, chunk_tokens=4)

    arguments = (x["student"], x["student_head"], x["teacher"], x["teacher_head"], x["mask"], tokens, segments)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, whole if i in (1, 3) else batch_sharding(mesh)) for i, a in enumerate(arguments)]
        actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), actual, expected)


def test_alignment_loss_is_the_norm_not_its_square():
    target, output = np.zeros((1, 3, 4), np.float32), np.zeros((1, 3, 4), np.float32)
    output[0, 0], output[0, 1], output[0, 2] = 2.0, 4.0, 100.0
    mask = np.array([[1.0, 1.0, 0.0]], np.float32)
    np.testing.assert_allclose(alignment_loss(target, output, mask), 2.0 + 4.0, rtol=1e-6)
    gradient = jax.grad(lambda o: alignment_loss(target, o, mask))(target)
    assert np.all(np.asarray(gradient) == 0)


def test_targets_do_not_cross_documents_or_padding():
    tokens, segments = np.array([[5, 6, 7, 8, 9, 0]]), np.array([[1, 1, 2, 2, 2, 0]])
    targets, mask = next_token_targets(tokens, segments)
    np.testing.assert_array_equal(mask, [[1, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(targets)[mask == 1], [6, 8, 9])
