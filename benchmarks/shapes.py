"""The sizes of published models, for programs that need no weights."""

from jaxhybrid.model.config import ModelConfig, RopeConfig


def _qwen2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen2", vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, norm_eps=1e-6, max_position_embeddings=32768, tie_embeddings=tied,
        qkv_bias=True, rope=RopeConfig(theta=1e6),
    )  # fmt: skip


SHAPES = {
    "smollm2-135m": ModelConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, norm_eps=1e-5, max_position_embeddings=8192, tie_embeddings=True,
    ),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, True),
    "llama-3.2-3b": ModelConfig(
        family="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24,
        num_kv_heads=8, head_dim=128, norm_eps=1e-5, max_position_embeddings=131072, tie_embeddings=True,
        rope=RopeConfig(theta=5e5),
    ),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064, False),
}  # fmt: skip


def quarter(depth: int) -> tuple[int, ...]:
    """A quarter of the layers, evenly: what a hybrid keeps as softmax here."""
    return tuple(range(3, depth, 4))
