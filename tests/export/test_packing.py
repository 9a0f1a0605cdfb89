"""Packed rows: documents in one row see nothing of each other, by whichever argument they are told apart."""

from itertools import pairwise

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening, DynamicCache
from transformers.masking_utils import flash_attention_mask

from tests.export.models import FULL, GLA, PLAIN, make_model, tokens

LENGTHS = (5, 70, 1, 2, 9)  # over chunks of 64, and shorter than the convolution
SOFTMAX, LINEAR = ["full_attention"] * 2, ["linear_attention"] * 2
SHORT = FULL | {"conv_size": 2, "expand_kv": True}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(lengths=LENGTHS):
    """Documents, and one row of them with positions that restart."""
    documents = [tokens(1, length) for length in lengths]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(n) for n in lengths])[None]


def apart(model, documents, start=0):
    with torch.no_grad():
        places = (start + torch.arange(document.shape[1])[None] for document in documents)
        return torch.cat([model(x, position_ids=at).logits for x, at in zip(documents, places)], dim=1)


@pytest.mark.parametrize(
    ("linear", "attn"),
    [(PLAIN, "eager"), (FULL, "sdpa"), (SHORT, "sdpa"), (FULL, "flex_attention"), (GLA, "sdpa")],
    ids=["plain-eager", "full-sdpa", "short-sdpa", "full-flex", "gla-sdpa"],
)
@torch.compiler.set_stance("force_eager")  # flex attention would compile for a minute
def test_documents_of_a_row_are_apart(linear, attn):
    model = make_model(linear, attn=attn, head_dim=16)
    documents, row, positions = packed()
    expected = apart(model, documents)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": document[0].tolist()} for document in documents]
    )
    ends = {name: batch[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    told = [
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": torch.ones_like(row)},
        ends,
        {"seq_idx": batch["seq_idx"]},
        {name: value for name, value in batch.items() if name != "labels"},
    ]
    with torch.no_grad():
        for arguments in told:
            logits = model(**{"input_ids": row} | arguments).logits
            assert (logits - expected).abs().max() < 1e-4, arguments.keys()
        assert (model(row).logits - expected).abs().max() > 0.1  # else being apart would mean little
        shifted = model(row, position_ids=positions + 3).logits  # what counts is that they restart
        assert (shifted - apart(model, documents, 3)).abs().max() < 1e-4


@pytest.mark.parametrize("layer_types", [SOFTMAX, LINEAR], ids=["softmax", "linear"])
def test_models_of_one_kind_of_layer(layer_types):
    model = make_model(FULL, layer_types=layer_types, num_hidden_layers=2)
    documents, row, positions = packed()
    with torch.no_grad():
        for mask in (None, torch.ones_like(row)):
            logits = model(row, attention_mask=mask, position_ids=positions).logits
            assert (logits - apart(model, documents)).abs().max() < 1e-4
    if layer_types is SOFTMAX:
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="keeps no account of packed documents"):
            model(row, position_ids=positions, past_key_values=cache)
        assert model(row, position_ids=positions).get("past_key_values") is None


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
def test_rows_with_padding(linear):
    """Padding before, between and inside documents, at other places in each row."""
    model = make_model(linear)
    rows, masks, positions, expected = [], [], [], []
    for lengths, holes in (((30, 3, 37), {0: 9, 33: 2, 50: 1}), ((1, 66), {0: 4, 20: 3, 67: 8})):
        documents, row, place = packed(lengths)
        order = []  # tokens of the row, and None for padding
        for t in range(row.shape[1] + 1):
            order += [None] * holes.get(t, 0) + [t]
        order = order[:-1]
        masks.append(torch.tensor([t is not None for t in order]).long())
        rows.append(torch.tensor([0 if t is None else row[0, t] for t in order]))
        positions.append(torch.tensor([1 if t is None else place[0, t] for t in order]))
        expected.append(apart(model, documents)[0])
    rows, masks, positions = (torch.stack(x) for x in (rows, masks, positions))
    documents = torch.stack([((p == 0) & (m == 1)).cumsum(0) for p, m in zip(positions, masks)])
    with torch.no_grad():
        for arguments in ({"position_ids": positions}, {"seq_idx": documents * masks - 1 + masks}):
            logits = model(rows, attention_mask=masks, **arguments).logits
            for row in range(2):
                assert (logits[row, masks[row] == 1] - expected[row]).abs().max() < 1e-4


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
@pytest.mark.parametrize("cuts", [(5, 6, 40, 75, 80, 82), (4, 76), (3, 77, 79)])
def test_documents_that_start_in_a_later_call(linear, cuts):
    model = make_model(linear)
    documents, row, positions = packed()
    cache, parts = DynamicCache(config=model.config), []
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones_like(row)], 1)  # and two tokens of padding
    row, positions = (torch.cat([x.new_zeros(1, 2), x], 1) for x in (row, positions))
    with torch.no_grad():
        for start, end in pairwise((0, *(2 + cut for cut in cuts), row.shape[1])):
            new = slice(start, end)
            arguments = {"attention_mask": mask[:, :end], "position_ids": positions[:, new]}
            parts.append(model(row[:, new], past_key_values=cache, **arguments).logits)
        assert (torch.cat(parts, 1)[:, 2:] - apart(model, documents)).abs().max() < 1e-4
        # What follows without positions goes on with the last document.
        after, more = model(row[:, 2:6], past_key_values=cache).logits, torch.cat([documents[-1], row[:, 2:6]], 1)
        assert (after - model(more).logits[:, -4:]).abs().max() < 1e-4


@pytest.mark.parametrize("layer_types", [["linear_attention", "full_attention"], LINEAR], ids=["hybrid", "linear"])
def test_generation_goes_on_with_the_last_document(layer_types):
    model = make_model(FULL, layer_types=layer_types, num_hidden_layers=2)
    documents, row, positions = packed((6, 11))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        expected = model.generate(documents[-1], **greedy, **options)[:, 11:]
        assert torch.equal(model.generate(row, position_ids=positions, **greedy, **options)[:, 17:], expected), options


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
def test_gradients_are_the_sum_over_documents(linear):
    model = make_model(linear).double()
    documents, row, positions = packed()
    weights = torch.randn(1, row.shape[1], 61, dtype=torch.float64)

    def gradients(calls):
        model.zero_grad()
        for logits, weight in calls:
            (logits.log_softmax(-1) * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = gradients([(model(row, position_ids=positions).logits, weights)])
    pieces = zip((model(document).logits for document in documents), weights.split(LENGTHS, dim=1))
    for name, expected in gradients(pieces).items():
        assert (together[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name  # the rule is in float32


# --- flash attention needs a GPU: its arguments are checked by an attention that obeys them


def varlen_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, **others):
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert others["max_length_q"] == others["max_length_k"] == cu_seq_lens_q.diff().max()
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # rows one after another
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    parts = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        arguments = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*arguments, is_causal=True, scale=scaling)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).unflatten(0, (query.shape[0], -1)), None


def test_flash_attention_gets_documents_or_refuses():
    AttentionInterface.register("flash_stub", varlen_attention)
    AttentionMaskInterface.register("flash_stub", flash_attention_mask)
    model = make_model(FULL)
    documents, row, positions = packed((9, 3, 8, 20))
    rows, places = row.reshape(2, 20), positions.reshape(2, 20)
    expected = apart(model, documents).reshape(2, 20, -1)
    model.config._attn_implementation = "flash_stub"
    with torch.no_grad():
        first = model(rows, position_ids=places)
        assert (first.logits - expected).abs().max() < 1e-4
        mask = torch.ones_like(rows)
        mask[0, -1] = 0
        with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
            model(rows, position_ids=places, attention_mask=mask)
        with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
            model(rows[:, :1], cache=first[1])
        model.config._attn_implementation = "stub"
        with pytest.raises(ValueError, match="'stub' is not known to keep packed documents apart"):
            model(rows, position_ids=places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": [[0, 1, 2, 0, 1, 2]], "seq_idx": [[0, 0, 0, 0, 1, 1]]}, "disagree .* row 0, token 3"),
        ({"position_ids": [[0, 1, 2, 3, 4, 5]], "cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 2, 6]}, "token 2"),
        ({"cu_seq_lens_q": [0, 2, 6], "seq_idx": [[0, 0, 0, 0, 0, 0]], "cu_seq_lens_k": [0, 2, 6]}, "token 2"),
        ({"cu_seq_lens_q": [0, 2, 6]}, "needed together"),
        ({"cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 3, 6]}, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"cu_seq_lens_q": [0, 2, 5], "cu_seq_lens_k": [0, 2, 5]}, "must rise from 0 to 6"),
        ({"cu_seq_lens_q": [0, 4, 2, 6], "cu_seq_lens_k": [0, 4, 2, 6]}, "must rise from 0 to 6"),
        (
            {"cu_seq_lens_q": [0, 6], "cu_seq_lens_k": [0, 6], "attention_mask": [[0, 1, 1, 1, 1, 1]]},
            "rows without padding",
        ),
        ({"seq_idx": [0, 0, 0, 0, 1, 1]}, r"seq_idx has shape \(6,\)"),
        ({"position_ids": [[0, 1, 2]]}, r"position_ids has shape \(1, 3\)"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\)"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 6), **{name: torch.tensor(value) for name, value in arguments.items()})


def test_what_a_cache_cannot_go_on_with_is_refused():
    model, x = make_model(), tokens(2, 6)
    ends = torch.tensor([0, 7, 12])
    with pytest.raises(ValueError, match="reaches beyond its row of 6 tokens"):
        model(x, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    cache = model(x)[1]
    with pytest.raises(ValueError, match="by position_ids"):
        model(x, cache=cache, seq_idx=torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"2 rows with 6 tokens in the cache and 6 new ones need \(2, 12\)"):
        model(x, cache=cache, attention_mask=torch.ones_like(x))
    masks = {"full_attention": None, "linear_attention": None}
    with pytest.raises(ValueError, match="not one for each type of layer"):
        model(x, attention_mask=masks, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
