"""Exports served by vLLM: its log probabilities against JAX's, and against the same folder in transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

VOCABULARY = 61


def prompts_of(folder, student):
    """Each prompt, with JAX's log probabilities after each of its tokens."""
    found = np.load(folder / f"{student}.npz")
    return [(found[f"tokens_{i}"].tolist(), found[f"log_probs_{i}"]) for i in range(len(found.files) // 2)]


def generate(llm, prompts, tokens=1, **settings):
    usual = {"temperature": 0, "logprobs": -1, "detokenize": False, "ignore_eos": True, "max_tokens": tokens}
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, SamplingParams(**usual | settings), use_tqdm=False)


def table(rows):
    """vLLM's log probabilities, [T,S]"""
    return np.array([[row[token].logprob for token in range(VOCABULARY)] for row in rows])


def answered(output):
    """Tokens that were generated, and the log probabilities that each was taken from."""
    (completion,) = output.outputs
    return list(completion.token_ids), table(completion.logprobs)


def test_log_probabilities(student, folder, start):
    """Six prompts at once, in pieces of 64 tokens at most, then eight tokens more: all next-token distributions."""
    prompts = prompts_of(folder, student)
    outputs = generate(start(folder / student), [tokens for tokens, _ in prompts], 8, prompt_logprobs=-1)
    model = AutoModelForCausalLM.from_pretrained(folder / student, trust_remote_code=True)
    for (tokens, expected), output in zip(prompts, outputs):
        new, decoded = answered(output)
        read = np.concatenate([table(output.prompt_logprobs[1:]).reshape(-1, VOCABULARY), decoded[:1]])
        np.testing.assert_allclose(read, expected, atol=1e-4)
        with torch.no_grad():
            logits = model(torch.tensor([tokens + new])).logits[0]
        after = logits.log_softmax(-1)[len(tokens) - 1 : -1]
        np.testing.assert_allclose(decoded, after, atol=1e-4)
        assert new == decoded.argmax(-1).tolist()


def test_without_enforce_eager(folder, start):
    """vLLM's default would record CUDA graphs on a GPU; the linear layers say that they have none."""
    prompts = prompts_of(folder, "mamba2")
    outputs = generate(start(folder / "mamba2", enforce_eager=False), [tokens for tokens, _ in prompts], 8)
    for (_, expected), output in zip(prompts, outputs):
        np.testing.assert_allclose(answered(output)[1][0], expected[-1], atol=1e-4)


def test_bfloat16(student, folder, start):
    """It rounds as transformers does."""
    ((tokens, expected),) = [pair for pair in prompts_of(folder, student) if len(pair[0]) == 300]
    (output,) = generate(start(folder / student, dtype="bfloat16"), [tokens], prompt_logprobs=-1)
    model = AutoModelForCausalLM.from_pretrained(folder / student, trust_remote_code=True, dtype="bfloat16")
    with torch.no_grad():
        other = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1).numpy()[:-1]

    def divergence(log_probs):
        return (np.exp(expected[:-1]) * (expected[:-1] - log_probs)).sum(-1).mean()

    served, alone = divergence(table(output.prompt_logprobs[1:])), divergence(other)
    print(f"{student}: KL to float32 {served:.2e}, of transformers {alone:.2e}")
    assert 0 < served < 1.5 * alone < 1e-2


def test_prefix_caching(folder, start):
    """A prompt that begins as an earlier one goes on from a copy of its state, which the first does not lose."""
    ((tokens, expected),) = [pair for pair in prompts_of(folder, "gated_deltanet") if len(pair[0]) == 300]
    llm = start(folder / "gated_deltanet", enable_prefix_caching=True, max_num_batched_tokens=512)
    other = [*tokens[:270], *reversed(tokens[270:])]
    (alone,) = generate(llm, [other], 4)
    llm.reset_prefix_cache()
    cached = []
    for prompt, place in ((tokens[:290], 289), (tokens[:299], 298), (other, None), (tokens, 299)):
        (output,) = generate(llm, [prompt], 4)
        cached.append(output.num_cached_tokens)
        new, log_probs = answered(output)
        if place is None:
            assert new == answered(alone)[0]
            np.testing.assert_allclose(log_probs, answered(alone)[1], atol=1e-4)
        else:
            np.testing.assert_allclose(log_probs[0], expected[place], atol=1e-4)
    # The third prompt leaves the others' before the block whose end has a state, if a block is as long as on a GPU.
    assert cached[0] == 0
    assert min(cached[1], cached[3]) >= 128


def test_preemption(folder, start):
    """Two texts that do not fit into the cache together: one is dropped, and read again from its start."""
    prompts = [tokens[:120] for tokens, _ in prompts_of(folder, "gated_deltanet") if len(tokens) >= 120]
    export = folder / "gated_deltanet"
    few = {"num_gpu_blocks_override": 9, "max_model_len": 384, "block_size": 128}
    llm = start(export, disable_log_stats=False, **few)
    assert llm.llm_engine.vllm_config.cache_config.block_size == 128  # what the numbers are chosen for
    outputs = generate(llm, prompts, 150)
    (preemptions,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions
    for prompt, output in zip(prompts, outputs):
        (alone,) = generate(llm, [prompt], 150)
        assert answered(output)[0] == answered(alone)[0]
        np.testing.assert_allclose(answered(output)[1], answered(alone)[1], atol=1e-4)


REFUSED = {
    "--tensor-parallel-size 2": {"tensor_parallel_size": 2},
    "--pipeline-parallel-size 2": {"pipeline_parallel_size": 2},
    "--mamba-cache-dtype float16": {"mamba_cache_dtype": "float16"},
    "--speculative-config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "--quantization fp8": {"quantization": "fp8"},
    "linear_mixer 'hyena' is not one of gated_deltanet": {"hf_overrides": {"linear_mixer": "hyena"}},
    "All layers are linear_attention": {"hf_overrides": {"layer_types": ["linear_attention"] * 5}},
    "--max-model-len 256 instead of 512": {
        "hf_overrides": {
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
        }
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words, folder, start):
    if "parallel-size" in words and torch.cuda.device_count() == 1:
        pytest.skip("vLLM itself refuses it with one GPU")
    with pytest.raises(ValueError) as refused:
        start(folder / "gated_deltanet", **REFUSED[words])
    assert words in str(refused.value)
