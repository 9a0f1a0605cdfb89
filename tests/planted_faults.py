"""Would the tests notice? Plants one fault at a time in a copy of the package and runs the test that must fail then.

    python tests/planted_faults.py              # every fault; half a minute of processor time each
    python tests/planted_faults.py score held   # those whose name holds one of these words

Every fault is a plausible slip that leaves a run going: it trains, finishes and exports. Exit code 1 when one survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AXES = "tests/stages/test_axes.py"
UPDATES = "tests/stages/test_updates.py::test_two_updates_equal_the_method_written_out"
WIRING = "tests/test_wiring.py"
MODEL = "tests/model/test_model.py"
SOFTMAX = "tests/model/test_softmax.py"
MIXTURE = "tests/model/test_mixture.py"
FLOAT8 = "tests/model/test_float8.py"
OPTIMIZER = "tests/train/test_optimizer.py"
QUALITY = "tests/evaluate/test_quality.py"
LIFETIMES = "tests/test_lifetimes.py"
CONVERT = "tests/weights/test_convert.py"
DECODING = "tests/decoding"
SCORING = "tests/selection/test_kl_guided.py"
MEASURED = "tests/selection/test_measured.py"
RECALLED = "tests/selection/test_recall_methods.py"
LAYERS = "tests/selection/test_planted_layers.py"
PACKING = "tests/export/test_packing.py"
RECALL = "tests/evaluate/test_recall.py"
ANSWERS = "tests/evaluate/test_answers.py"
RULER = "tests/evaluate/test_ruler.py"
WRITTEN = "tests/evaluate/test_written.py"
VOCABULARY = "tests/data/test_vocabulary.py"
PLAN = "tests/plan/test_model_plan.py"


class Fault(NamedTuple):
    name: str
    file: str  # in jaxhybrid/
    right: str  # occurs once
    wrong: str
    test: str  # a pytest node that must fail


FAULTS = [
    # Meshes.
    Fault(
        "mesh: what became of a shared row's pieces goes to the wrong device",
        "model/balanced.py",
        "permuted(part, AXIS, _inverse(to))",
        "permuted(part, AXIS, to)",
        "tests/model/test_balanced.py::test_values_and_gradients_of_a_shared_row[3]",
    ),
    Fault(
        "mesh: a device takes the first K/V head, not its own",
        "model/partition.py",
        'first = axis_index("tensor") * x.shape[heads] // axis_size("tensor")',
        'first = 0 * axis_index("tensor")',
        f"{AXES}::test_devices_together_equal_one[distill-shape1-61-mixer1]",
    ),
    Fault(
        "mesh: keys of a split row without their place",
        "model/transformer.py",
        'first = axis_index("context") * T if is_split else jnp.int32(0)',
        'first = 0 * axis_index("context") if is_split else jnp.int32(0)',
        f"{AXES}::test_devices_together_equal_one[distill-shape0-60-mixer0]",
    ),
    Fault(
        "mesh: the target after a device's last token is lost",
        "losses.py",
        "if not is_split:",
        "if True:",
        f"{AXES}::test_devices_together_equal_one[finetune-shape0-60-mixer0]",
    ),
    Fault(
        "mesh: padding columns of the head count as words",
        "model/head.py",
        'is_padded = self.numbers.shape[0] * shards() * axis_size("tensor") > vocab_size',
        "is_padded = False",
        f"{AXES}::test_devices_together_equal_one[finetune-shape1-61-mixer1]",
    ),
    Fault(
        "mesh: gradients summed in the compute dtype",
        "model/partition.py",
        "wide = gradient.astype(jnp.promote_types(sums, gradient.dtype))",
        "wide = gradient",
        f"{AXES}::test_gradients_are_scattered_in_the_dtype_that_was_asked_for[float32]",
    ),
    # A teacher in float8.
    Fault(
        "float8: one scale for a whole matrix",
        "model/float8.py",
        "largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)",
        "largest = jnp.max(jnp.abs(x), axis=None, keepdims=True)",
        f"{FLOAT8}::test_a_product_is_that_of_rounded_rows_and_columns",
    ),
    Fault(
        "float8: the first column's scale for all",
        "model/float8.py",
        "* self.rows * self.columns).astype(dtype)",
        "* self.rows * self.columns[:, :1]).astype(dtype)",
        f"{FLOAT8}::test_an_mlp_equals_the_one_written_out",
    ),
    Fault(
        "float8: the setting stays in the config",
        "stages/programs.py",
        'given["float8_teacher"] = settings.float8_teacher',
        'given["float8_teacher"] = False',
        f"{FLOAT8}::test_distillation_from_it_is_to_what_it_says",
    ),
    # Caps, and the softmax layers that stay.
    Fault(
        "cap: its slope left out of the loss's gradient",
        "losses.py",
        "gradient = columns.before_cap(gradient, logits)",
        "gradient = gradient + 0 * logits",
        "tests/test_losses.py::test_linear_kl_equals_dense_float64",
    ),
    Fault(
        "cap: capped scores given to cuDNN, which has no cap",
        "model/softmax.py",
        "q.dtype in (jnp.bfloat16, jnp.float16) and cap is None",
        "q.dtype in (jnp.bfloat16, jnp.float16)",
        f"{SOFTMAX}::test_capped_scores[gpu-padded]",
    ),
    Fault(
        "kept layers: changed while the teacher's attention is scored",
        "assembly.py",
        "config.softmax.to_model() if softmax_layers else teacher.softmax",
        "config.softmax.to_model()",
        "tests/test_settings.py::test_settings_of_kept_layers_are_of_the_hybrid",
    ),
    Fault(
        "kept layers: queries scaled from the second token on",
        "model/rope.py",
        "jnp.log(positions_BT.astype(jnp.float32) + a)",
        "jnp.log(jnp.maximum(positions_BT - 1, 0).astype(jnp.float32) + a)",
        "tests/model/test_kept_softmax.py::test_the_formula",
    ),
    # Softmax attention.
    Fault(
        "softmax: a query sees the document before its own",
        "model/softmax.py",
        "seen = key >= self.starts\n",
        "seen = key >= self.starts - 1\n",
        f"{SOFTMAX}::test_plain_form[float32-1024-3-1-packed]",
    ),
    Fault(
        "softmax: a window too narrow by a block",
        "model/softmax.py",
        "needed = jnp.max(ends - starts[:, :: window.queries])",
        "needed = jnp.max(ends - starts[:, :: window.queries]) - window.queries",
        f"{SOFTMAX}::test_form_of_gpus[packed-0]",
    ),
    Fault(
        "softmax: a window's gradient at another place",
        "model/softmax.py",
        "place = plan.before + window.first_key(at)",
        "place = window.first_key(at)",
        f"{SOFTMAX}::test_form_of_gpus[packed-0]",
    ),
    Fault(
        "softmax: blocks skipped as if the slice began the row",
        "model/softmax.py",
        "highest = (first + jnp.minimum(begins + block_q, Q) - 1) // block_k",
        "highest = (jnp.minimum(begins + block_q, Q) - 1) // block_k",
        f"{SOFTMAX}::test_slices_of_the_queries[splash-none]",
    ),
    # Which layer gets which row.
    Fault(
        "walk: a kind's rows at the layers of another",
        "model/walk.py",
        "first = places.index(begin)",
        "first = 0",
        f"{MODEL}::test_rows_are_spread_over_the_layers_and_collected_again",
    ),
    Fault(
        "walk: softmax where the mask says linear",
        "model/walk.py",
        "softmax.astype(jnp.int32)",
        "1 - softmax.astype(jnp.int32)",
        "tests/stages/test_stages.py::test_one_program_runs_every_hybrid",
    ),
    Fault(
        "walk: the gradient of the other kind",
        "model/walk.py",
        "pulls = [partial(pull, branch) for branch in branches]",
        "pulls = [partial(pull, branch) for branch in branches[::-1]]",
        f"{MODEL}::test_remat_gives_the_same_gradients",
    ),
    Fault(
        "earlier checkpoints: keys and values exchanged",
        "train/earlier.py",
        'return module.replace("_proj", "_bias") if leaf == "bias" else module',
        'return {"v_proj": "k_proj", "k_proj": "v_proj"}.get(module, module) if leaf != "bias" else '
        'module.replace("_proj", "_bias")',
        "tests/test_earlier.py::test_a_run_goes_on_to_the_same_figures",
    ),
    # Which tokens, which head, which parameters a step works with.
    Fault(
        "align: loss by microbatch",
        "stages/align.py",
        "micro, tokens, *compute",
        "micro, count_tokens(micro), *compute",
        f"{UPDATES}[gated_deltanet-align]",
    ),
    Fault(
        "align: mean of layers forgotten",
        "stages/align.py",
        "lambda g: g / count",
        "lambda g: g",
        f"{UPDATES}[gated_deltanet-align]",
    ),
    Fault(
        "align: padding counts",
        "stages/align.py",
        "mixer(normed, context)[0], mask), *BATCH_AXES)",
        "mixer(normed, context)[0], jnp.ones_like(mask)), *BATCH_AXES)",
        f"{UPDATES}[gated_deltanet-align]",
    ),
    Fault(
        "score: loss by microbatch",
        "stages/score.py",
        "return total / tokens",
        "return total / count_tokens(micro)",
        f"{UPDATES}[gated_deltanet-score]",
    ),
    Fault(
        "score: mixers alone train",
        "stages/score.py",
        "return jax.value_and_grad(loss)(state.params)",
        "value, g = jax.value_and_grad(loss)(state.params)\n"
        "        return value, {n: x if n == 'mixers' else jax.tree.map(jnp.zeros_like, x) for n, x in g.items()}",
        f"{UPDATES}[gated_deltanet-score]",
    ),
    Fault(
        "score: the student's head for the teacher's",
        "stages/score.py",
        "teacher_head.astype(dtype),",
        "head,",
        f"{UPDATES}[gated_deltanet-score]",
    ),
    Fault(
        "score: the attention of the layer before",
        "stages/score.py",
        "dynamic_slice_in_dim(w, layer, 1)",
        "dynamic_slice_in_dim(w, layer - 1, 1)",
        f"{WIRING}::test_candidates_start_from_the_aligned_student",
    ),
    Fault(
        "distill: loss by microbatch",
        "stages/distill.py",
        "chunk_tokens=chunk_tokens) / tokens",
        "chunk_tokens=chunk_tokens) / count_tokens(micro)",
        f"{UPDATES}[gated_deltanet-distill]",
    ),
    Fault(
        "distill: the student's head for the teacher's",
        "stages/distill.py",
        "linear_kl(own_hidden, own_head, hidden, head,",
        "linear_kl(own_hidden, own_head, hidden, own_head,",
        f"{UPDATES}[gated_deltanet-distill]",
    ),
    Fault(
        "distill: KL the other way round",
        "stages/distill.py",
        "linear_kl(own_hidden, own_head, hidden, head,",
        "linear_kl(hidden, head, own_hidden, own_head,",
        f"{UPDATES}[gated_deltanet-distill]",
    ),
    Fault(
        "finetune: loss by microbatch",
        "stages/finetune.py",
        "chunk_tokens=chunk_tokens) / tokens",
        "chunk_tokens=chunk_tokens) / jnp.sum(mask)",
        f"{UPDATES}[gated_deltanet-finetune]",
    ),
    Fault(
        "finetune: predicts over the border of documents",
        "losses.py",
        "((segments == following) & (segments != 0))",
        "((following != 0) & (segments != 0))",
        f"{UPDATES}[gated_deltanet-finetune]",
    ),
    Fault(
        "last microbatch forgotten",
        "stages/batch.py",
        "jax.tree.map(jnp.zeros_like, shapes), batch)",
        "jax.tree.map(jnp.zeros_like, shapes), jax.tree.map(lambda x: x[:-1], batch))",
        f"{UPDATES}[gated_deltanet-distill]",
    ),
    # The optimizer.
    Fault(
        "rates: warm-up ignored",
        "train/optimizer.py",
        "if warmup else value",
        "if False else value",
        f"{OPTIMIZER}::test_rates",
    ),
    Fault(
        "rates: cosine upside down",
        "train/optimizer.py",
        "(1 + jnp.cos(math.pi * done))",
        "(1 - jnp.cos(math.pi * done))",
        f"{OPTIMIZER}::test_rates",
    ),
    Fault(
        "rates: one for both groups",
        "settings/stages.py",
        '"mixer": (self.mixer_learning_rate,',
        '"mixer": (self.learning_rate,',
        f"{OPTIMIZER}::test_both_groups_follow_their_own_rates",
    ),
    Fault(
        "groups: the norm before a mixer left out",
        "train/optimizer.py",
        '{"mixers", "input_norm", ',
        '{"mixers", ',
        f"{OPTIMIZER}::test_every_leaf_has_its_group",
    ),
    Fault(
        "no clipping",
        "train/optimizer.py",
        "optax.clip_by_global_norm(stage.clip_norm)",
        "optax.identity()",
        f"{OPTIMIZER}::test_clipping_is_by_the_norm_over_all_leaves",
    ),
    # Where a stage starts from, and on which text it is measured.
    Fault(
        "candidates from the unaligned student",
        "assembly.py",
        'values["mixers"] | self.aligned_mixers()',
        'values["mixers"] | self.initial_mixers()',
        WIRING,
    ),
    Fault(
        "distillation from unaligned mixers",
        "assembly.py",
        'Model({"mixers": self.aligned_mixers()}',
        'Model({"mixers": self.initial_mixers()}',
        WIRING,
    ),
    Fault(
        "finetuning from the undistilled student",
        "pipeline.py",
        'return self.models.trained("distill").params',
        "return self.models.hybrid()",
        WIRING,
    ),
    Fault(
        "evaluation of the undistilled student",
        "pipeline.py",
        "{stage: self.models.trained(stage, self.dtype) for",
        "{stage: Model(self.models.hybrid(), self.models.hybrid_config) for",
        WIRING,
    ),
    # What is in memory.
    Fault(
        "masters from the rounded teacher",
        "assembly.py",
        'return self.dtype == jnp.float32 or self.teacher_files.types == {"BF16"}',
        "return True",
        f"{LIFETIMES}::test_students_start_from_the_values_of_the_files",
    ),
    Fault(
        "finetuning beside the teacher",
        "pipeline.py",
        "self.models.drop_teacher()\n        student = self.models.hybrid_config",
        "student = self.models.hybrid_config",
        f"{LIFETIMES}::test_finetuning_holds_one_state_and_no_teacher",
    ),
    Fault(
        "the loaded student beside the state",
        "pipeline.py",
        "state = jax.jit(begin, donate_argnums=0 if stays else ())(make())",
        "state = jax.jit(begin)(own := make())",
        f"{LIFETIMES}::test_finetuning_holds_one_state_and_no_teacher",
    ),
    Fault(
        "held-out text is training text",
        "data/text.py",
        "self.heldout, sequence_length",
        "self.train, sequence_length",
        WIRING,
    ),
    Fault(
        "training text holds the held-out one",
        "data/text.py",
        "train, heldout = take_heldout(train, config.heldout_tokens)",
        "_, heldout = take_heldout(train, config.heldout_tokens)",
        WIRING,
    ),
    # How a text begins and ends.
    Fault(
        "text: documents without the tokenizer's beginning",
        "data/vocabulary.py",
        "([*self._begun(encoding.ids), self.end_id]",
        "([*encoding.ids, self.end_id]",
        VOCABULARY,
    ),
    Fault(
        "text: a spelled-out beginning doubled",
        "data/vocabulary.py",
        "return ids if ids[: len(begin)] == begin else begin + ids",
        "return begin + ids",
        VOCABULARY,
    ),
    Fault(
        "text: documents end with the end of a turn",
        "data/vocabulary.py",
        "if tokenizer.eos_token in END_TOKENS or not known else known[0]",
        "if tokenizer.eos_token or not known else known[0]",
        VOCABULARY,
    ),
    Fault(
        "text: benchmark without the tokenizer's beginning",
        "evaluate/harness.py",
        "begin=add_special_tokens is not False",
        "begin=False",
        "tests/evaluate/test_harness.py::test_likelihoods_are_those_of_transformers",
    ),
    Fault(
        "text: end tokens of config.json forgotten",
        "complete.py",
        'SETTINGS = ("generation_config.json", "config.json")',
        'SETTINGS = ("generation_config.json",)',
        "tests/test_complete.py::test_end_tokens_are_read_where_transformers_reads_them",
    ),
    Fault(
        "held-out KL counts padding",
        "selection/kl_guided.py",
        'counted = own.get("counted", (own["segment_ids"] != 0).astype(np.float32))',
        'counted = own.get("counted", np.ones(own["segment_ids"].shape, np.float32))',
        WIRING,
    ),
    Fault(
        "a resumed candidate reads the first batch's states",
        "selection/kl_guided.py",
        'self.number = state["number"]',
        "self.number = 0",
        f"{SCORING}::test_a_resumed_candidate_goes_on_with_the_teachers_states_of_its_own_batches",
    ),
    # Evaluation.
    Fault(
        "evaluation: KL the other way round",
        "evaluate/quality.py",
        "((p, log_zp, 1), (q, log_zq, -1))",
        "((q, log_zq, -1), (p, log_zp, 1))",
        QUALITY,
    ),
    Fault(
        "evaluation: perplexity over all tokens",
        "evaluate/quality.py",
        '"perplexity": ("cross_entropy", "predicted"),',
        '"perplexity": ("cross_entropy", "tokens"),',
        QUALITY,
    ),
    Fault(
        "evaluation: KL counts padding",
        "evaluate/quality.py",
        'predicted, token_mask(batch["segment_ids"]), batch',
        "predicted, jnp.ones_like(predicted), batch",
        QUALITY,
    ),
    Fault(
        "evaluation: positions count from the start of the row",
        "evaluate/quality.py",
        "return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)",
        "return index + 0 * np.maximum.accumulate(np.where(begins, index, 0), axis=1)",
        QUALITY,
    ),
    # Decoding.
    Fault(
        "decoding: the place after a row's text is seen",
        "model/softmax.py",
        "seen = jnp.arange(M, dtype=jnp.int32) <= last[:, None]",
        "seen = jnp.arange(M, dtype=jnp.int32) <= last[:, None] + 1",
        f"{DECODING}/test_generate.py::test_a_long_answer_through_growing_caches_equals_recomputation",
    ),
    Fault(
        "decoding: a filled slot remembers the text before",
        "model/decode.py",
        "jnp.where(chunk.first == 0, 0, s)",
        "jnp.where(chunk.first < 0, 0, s)",
        f"{DECODING}/test_engine.py::test_slots_are_filled_and_freed_while_others_run",
    ),
    Fault(
        "decoding: positions begin anew with each chunk",
        "model/decode.py",
        "jnp.zeros_like(segments) + chunk.first + places",
        "jnp.zeros_like(segments) + places",
        f"{DECODING}/test_engine.py::test_a_prompt_in_chunks_gives_the_state_of_the_whole[conv]",
    ),
    Fault(
        "decoding: a memory takes what is beside a prompt",
        "model/decode.py",
        "segments = (places < chunk.counts[:, None]).astype(jnp.int32)",
        "segments = (places <= chunk.counts[:, None]).astype(jnp.int32)",
        f"{DECODING}/test_engine.py::test_slots_are_filled_and_freed_while_others_run",
    ),
    Fault(
        "decoding: the state is copied into each step",
        "decoding/engine.py",
        '@partial(jax.jit, static_argnames=("steps", "drawn"), donate_argnames="states")',
        '@partial(jax.jit, static_argnames=("steps", "drawn"))',
        f"{DECODING}/test_engine.py::test_a_step_writes_the_state_in_place_and_copies_no_cache_and_no_weight",
    ),
    Fault(
        "decoding: a tied head is turned for each call",
        "model/decode.py",
        "if model.config.tie_embeddings else columns",
        "if not model.config else columns",
        f"{DECODING}/test_engine.py::test_a_step_writes_the_state_in_place_and_copies_no_cache_and_no_weight",
    ),
    Fault(
        "decoding: a program for each number of end tokens",
        "decoding/engine.py",
        "return Rows(token, length, still, ends_of, in_rows(settings), seen)",
        "return Rows(token, length, still, ends_of[:, : max(len(r.end_ids) for r in self.requests.values())], "
        "in_rows(settings), seen)",
        f"{DECODING}/test_engine.py::test_few_programs_serve_all_lengths_and_settings",
    ),
    Fault(
        "decoding: top-p without the token that reaches p",
        "decoding/sampling.py",
        "likelier = jnp.cumsum(kept, axis=-1) - kept",
        "likelier = jnp.cumsum(kept, axis=-1)",
        f"{DECODING}/test_sampling.py::test_filters_keep_what_their_rules_keep",
    ),
    Fault(
        "decoding: the same noise at every place",
        "decoding/sampling.py",
        "jax.random.fold_in(jax.random.key(seed), place)",
        "jax.random.fold_in(jax.random.key(seed), 0 * place)",
        f"{DECODING}/test_sampling.py::test_noise_follows_seed_and_place",
    ),
    Fault(
        "decoding: the beginning of a stop string is given out",
        "decoding/text.py",
        "return self._piece(len(sure) - begun)",
        "return self._piece(len(sure))",
        f"{DECODING}/test_text.py",
    ),
    Fault(
        "decoding: the folder's repetition penalty forgotten",
        "complete.py",
        ".get(PENALTY) or 1.0",
        ".get(PENALTY) and 1.0",
        "tests/test_complete.py::test_answers_are_those_of_transformers_with_the_folders_penalty",
    ),
    # Conversion.
    Fault(
        "rows repeated instead of heads",
        "model/mixers/linear.py",
        "repeated(attention[name][leaf], clones, axis=-2)",
        "repeated(attention[name][leaf], clones, axis=-1).reshape(*attention[name][leaf].shape[:-2], -1, "
        "config.head_dim)",
        f"{CONVERT}::test_grouped_heads_are_cloned_whole",
    ),
    Fault(
        "a value gate in the wrong head order",
        "model/mixers/linear.py",
        'taken["g_proj"] = cloned("v_proj", config.num_heads // config.num_kv_heads, ("kernel",))',
        'taken["g_proj"] = {"kernel": jnp.tile(attention["v_proj"]["kernel"], (config.num_heads // '
        "config.num_kv_heads, 1))}",
        f"{CONVERT}::test_a_gate_copied_from_the_values_has_the_values_heads",
    ),
    # What lies on the disk.
    Fault(
        "damaged teacher states are used",
        "selection/teacher_cache.py",
        "if known == present:",
        "if known != ABSENT:",
        "tests/selection/test_teacher_cache.py::test_every_damage_is_found_and_mended",
    ),
    Fault(
        "damaged tokens are used",
        "data/token_file.py",
        "== self._checksums[block]",
        "!= 0",
        "tests/data/test_tokens.py::test_every_damage_to_a_cache_is_found_and_mended",
    ),
    Fault(
        "damaged scores are used",
        "checksums.py",
        "if value[KEY] != _text_checksum(found):",
        "if not value[KEY]:",
        "tests/test_damage.py::test_every_damage_to_scores_is_found_or_harmless",
    ),
    Fault(
        "a round goes on from the last round's checkpoint",
        "selection/kept_state.py",
        "latest or 0) > step:",
        "latest or 0) >= step:",
        "tests/selection/test_kept_state.py",
    ),
    Fault(
        "moments come back, changes do not",
        "selection/kept_state.py",
        "then + change",
        "then",
        "tests/selection/test_kept_state.py",
    ),
    # What transformers gets.
    Fault(
        "export: convolution reaches over documents",
        "export/remote_code/linear_attention_jaxhybrid.py",
        " * same[:, None, w]",
        "",
        f"{PACKING}::test_documents_of_a_row_are_apart[full-sdpa]",
    ),
    Fault(
        "export: a document takes over a state",
        "export/remote_code/linear_attention_jaxhybrid.py",
        "log_decay.masked_fill(over(first, log_decay), FORGET)",
        "log_decay",
        f"{PACKING}::test_documents_of_a_row_are_apart[plain-eager]",
    ),
    Fault(
        "export: softmax layers see the document before",
        "export/remote_code/packing_jaxhybrid.py",
        "key >= start[batch, query - columns]",
        "key >= 0",
        f"{PACKING}::test_documents_of_a_row_are_apart[plain-eager]",
    ),
    Fault(
        "export: a later call forgets its document",
        "export/remote_code/packing_jaxhybrid.py",
        "start = torch.maximum(torch.where(first, column, 0).cummax(1).values, start)",
        "start = torch.where(first, column, 0).cummax(1).values",
        f"{PACKING}::test_documents_that_start_in_a_later_call",
    ),
    Fault(
        "export: padding counts as the token before",
        "export/remote_code/packing_jaxhybrid.py",
        "return padded.gather(1, F.pad(torch.where(real, place, 0), (1, 0)).cummax(1).values)",
        "return padded",
        f"{PACKING}::test_rows_with_padding",
    ),
    Fault(
        "export: gates in the dtype of their weights",
        "export/remote_code/linear_attention_jaxhybrid.py",
        "F.linear(x.float(), self.weight.float(), None",
        "F.linear(x.to(self.weight.dtype), self.weight, None",
        "tests/export/test_modeling.py::test_save_and_load",
    ),
    Fault(
        "export: one of the cache's names is dropped",
        "export/remote_code/modeling_jaxhybrid.py",
        "cache = past_key_values if cache is None else cache",
        "cache = past_key_values",
        "tests/export/test_modeling.py::test_both_names_of_a_cache",
    ),
    Fault(
        "recall: answers read a token too late",
        "evaluate/answers.py",
        "places[..., None] + np.arange(answers.shape[2])",
        "places[..., None] + 1 + np.arange(answers.shape[2])",
        ANSWERS,
    ),
    Fault(
        "recall: logits rounded before the choice",
        "model/head.py",
        "logits = jnp.dot(hidden_ND, self.weight, preferred_element_type=exact_dtype(hidden_ND.dtype))",
        "logits = jnp.dot(hidden_ND, self.weight).astype(exact_dtype(hidden_ND.dtype))",
        ANSWERS,
    ),
    Fault(
        "recall: a number that begins like another is another's",
        "evaluate/recall.py",
        "result[prompt] = any(",
        "result[prompt] = bool(len(alike)) or any(",
        RECALL,
    ),
    Fault(
        "ruler: a prompt may take the room of its answer",
        "evaluate/ruler/fit.py",
        "materials.asker, length - task.new_tokens",
        "materials.asker, length",
        RULER,
    ),
    Fault(
        "ruler: depths of needles in the order of the question",
        "evaluate/ruler/niah.py",
        "before[order.index(n)] / size",
        "sorted(before)[n] / size",
        RULER,
    ),
    Fault(
        "written answers: any answer is all answers",
        "evaluate/written.py",
        'if scoring == "part" else',
        "if True else",
        WRITTEN,
    ),
    Fault(
        "written answers: those of a batch in the order they were run",
        "evaluate/written.py",
        "for number, tokens in zip(group, written):",
        "for number, tokens in zip(sorted(group), written):",
        WRITTEN,
    ),
    Fault(
        "ablation: the other layers are off",
        "evaluate/ablation.py",
        "(kind == FULL_ATTENTION) == softmax",
        "(kind == FULL_ATTENTION) != softmax",
        WRITTEN,
    ),
    Fault(
        "recall: thirds by question, not by place in the list",
        "evaluate/recall_figures.py",
        "3 * task.listed // task.pairs",
        "3 * np.sort(task.listed) // task.pairs",
        RECALL,
    ),
    Fault(
        "recall: answers of a prompt counted as independent",
        "evaluate/recall_figures.py",
        "float(means.var()) / prompts",
        "float(means.mean() * (1 - means.mean())) / answers.size",
        RECALL,
    ),
    Fault(
        "recall: a teacher that cannot do the task compares students",
        "evaluate/recall.py",
        '["share"] >= LEAST_TEACHER',
        '["share"] >= 0.0',
        RECALL,
    ),
    Fault(
        "weight decay of norms and biases",
        "train/optimizer.py",
        "if decays(path) else update",
        "if True else update",
        "tests/train/test_weight_decay.py",
    ),
    Fault(
        "early stop by few tokens",
        "selection/ranking.py",
        'rows[-1]["tokens"] - rule.window_tokens for',
        'rows[-1]["tokens"] - rule.window_tokens / 2 for',
        "tests/selection/test_selection.py",
    ),
    Fault(
        "early stop by held-out KL whatever is asked for",
        "selection/kl_guided.py",
        "is_stable(rule, best, config.select.rank_by)",
        'is_stable(rule, best, "heldout")',
        f"{SCORING}::test_scoring_ends_when_the_best_layers_stay_the_same",
    ),
    Fault(
        "untrained KL measured in every round",
        "selection/kl_guided.py",
        "if earlier else programs",
        "if False else programs",
        f"{SCORING}::test_rounds_give_the_scores_of_one_go_even_when_a_state_is_damaged",
    ),
    Fault(
        "layers ranked by held-out KL whatever is asked for",
        "selection/methods/kl_guided.py",
        "scores.importance(given.settings.rank_by)",
        'scores.importance("heldout")',
        "tests/selection/test_stage.py",
    ),
    Fault(
        "greedy: each layer measured alone in every round",
        "selection/methods/greedy_kl.py",
        "layer: search.kept | {layer} for layer",
        "layer: frozenset({layer}) for layer",
        f"{MEASURED}::test_greedy_search_is_that_over_separate_hybrids",
    ),
    Fault(
        "greedy: the best on few tokens is taken",
        "selection/greedy.py",
        "layer = lowest(best)[0]\n            found",
        "layer = lowest(scores)[0]\n            found",
        f"{MEASURED}::test_the_closest_are_scored_again_and_the_best_of_them_is_taken",
    ),
    Fault(
        "greedy: a lazy round allows for no growth",
        "selection/greedy.py",
        "gain * growth if gain > 0 else gain / growth",
        "gain",
        f"{MEASURED}::test_a_lazy_search_allows_for_growth_as_far_as_it_is_told",
    ),
    Fault(
        "greedy: a lazy round ends before the closest are found",
        "selection/greedy.py",
        "wanted = 1 if few == student.batches else self._settings.rescore",
        "wanted = 1",
        f"{MEASURED}::test_a_lazy_search_finds_the_same_in_fewer_tokens",
    ),
    Fault(
        "masked student: the mask upside down",
        "selection/masked.py",
        "return np.isin(np.arange(self.depth), list(kept))",
        "return ~np.isin(np.arange(self.depth), list(kept))",
        f"{MEASURED}::test_the_mask_gives_the_kl_of_a_hybrid_of_its_own",
    ),
    Fault(
        "diagnostic data: all layers but the one asked for are removed",
        "selection/ablated.py",
        "jnp.where(kept, mixed, jnp.zeros_like(mixed))",
        "jnp.where(kept, jnp.zeros_like(mixed), mixed)",
        f"{RECALLED}::test_ablation_is_the_walk_without_a_mixer",
    ),
    Fault(
        "Gram: changes of all logits of a token count",
        "selection/gram.py",
        "changes - means[..., None]",
        "changes - 0 * means[..., None]",
        f"{LAYERS}::test_the_form_is_that_of_whole_logits",
    ),
    Fault(
        "gates: open is linear",
        "selection/gated.py",
        "gate * attention(normed, context)[0] + (1 - gate) * linear(normed, context)[0]",
        "(1 - gate) * attention(normed, context)[0] + gate * linear(normed, context)[0]",
        f"{LAYERS}::test_gates_mix_both_branches_on_the_stream_that_goes_on",
    ),
    Fault(
        "HALO: the paper's falls are the code's",
        "selection/methods/halo_ratio.py",
        'whole if form == "paper" else',
        'whole if form == "code" else',
        f"{RECALLED}::test_the_two_forms_of_halos_ratio",
    ),
    Fault(
        "beam: one set is kept",
        "selection/beam.py",
        "[:width]",
        "[:1]",
        f"{LAYERS}::test_a_beam_finds_a_pair_that_greedy_cannot",
    ),
    Fault(
        "a stage reads short documents",
        "data/text.py",
        ".at_least(stage.min_document_tokens or 1)",
        ".at_least(1)",
        "tests/data/test_stage_text.py",
    ),
    Fault(
        "held-out documents are separate whatever is asked for",
        "data/text.py",
        "self.heldout, sequence_length, batch_size, tokens, *_this_host(), separate_documents=self.separate_documents",
        "self.heldout, sequence_length, batch_size, tokens, *_this_host()",
        "tests/data/test_stage_text.py",
    ),
    # Launching.
    Fault(
        "launch: a preemption ends the JobSet",
        "launch/gke.py",
        '"RestartJobSetAndIgnoreMaxRestarts"',
        '"FailJobSet"',
        "tests/launch/test_gke.py::test_what_follows_the_end_of_a_pod",
    ),
    Fault(
        "launch: a state that cannot be asked for counts as gone",
        "launch/templates/tpu_vm.sh.j2",
        'until [[ $(state || echo UNKNOWN) == "" ]]; do',
        'until [[ $(state) == "" ]]; do',
        "tests/launch/test_tpu_vm.py::test_a_state_that_cannot_be_asked_for_is_not_taken_for_gone",
    ),
    Fault(
        "launch: as many pods as chips",
        "launch/gke.py",
        '"completions": job.slice.hosts',
        '"completions": job.slice.devices',
        "tests/launch/test_gke.py::test_a_jobset_is_one",
    ),
    # Mixtures of experts.
    Fault(
        "experts: the router's weights do not add up to one",
        "model/layers.py",
        "if self.normalise:",
        "if False:",
        f"{MIXTURE}::test_values_and_each_gradient[changes0-silu-0.0]",
    ),
    Fault(
        "experts: tokens get each other's results",
        "model/layers.py",
        "jnp.argsort(order))",
        "order)",
        f"{MIXTURE}::test_values_and_each_gradient[changes0-silu-0.0]",
    ),
    Fault(
        "experts: gate and up change places in files that have them together",
        "weights/names.py",
        '("gate_proj", "up_proj"), "down',
        '("up_proj", "gate_proj"), "down',
        "tests/families/test_mixtures.py::test_one_tensor_of_all_experts_is_read_too[qwen3_moe-0]",
    ),
    Fault(
        "experts: a plan counts every expert for each token",
        "plan/work.py",
        "(() if grouped is None else grouped.rhs_group_dimensions)",
        "()",
        f"{MIXTURE}::test_a_plan_counts_the_products_of_chosen_experts_and_the_bytes_of_all",
    ),
    # Plans.
    Fault(
        "plan: what lies beside a step is not counted",
        "plan/memory.py",
        'compiled["out_of_memory"]["needed"]) + held',
        'compiled["out_of_memory"]["needed"])',
        f"{PLAN}::test_a_suggestion_is_the_first_that_the_compiler_takes",
    ),
    Fault(
        "plan: a suggestion is compiled as the config is",
        "plan/steps.py",
        "tree[section][name] = value",
        "tree[section].setdefault(name, value)",
        f"{PLAN}::test_a_suggestion_is_the_first_that_the_compiler_takes",
    ),
    Fault(
        "plan: a gather brings one part, not all others",
        "plan/collectives.py",
        'return "gather", size * away',
        'return "gather", size / devices',
        "tests/plan/test_operations.py::test_exchanges_by_kind_and_axes",
    ),
]


def survives(fault: Fault, copy: Path) -> bool:
    file = copy / "jaxhybrid" / fault.file
    sound = file.read_text()
    if sound.count(fault.right) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.file} holds {fault.right!r} {sound.count(fault.right)} times, not once."
        )
    file.write_text(sound.replace(fault.right, fault.wrong))
    try:
        return not fails(fault.test, copy)
    finally:
        file.write_text(sound)


def fails(test: str, copy: Path) -> bool:
    """Whether an assertion of the test fails, with the copy's package in place of the installed one."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short", test]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    asserted = re.search(r"^E +(AssertionError|assert )", done.stdout, re.MULTILINE) and "\nERROR " not in done.stdout
    if done.returncode != 0 and not asserted:  # the fault stops the program: a test was not needed to see it
        raise SystemExit(f"{test} ended otherwise than by an assertion:\n{done.stdout}{done.stderr}")
    return done.returncode != 0


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("jaxhybrid", "tests", "configs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "conftest.py"):
            shutil.copyfile(ROOT / name, copy / name)
        survivors = []
        for fault in chosen:
            alive = survives(fault, copy)
            survivors += [fault] * alive
            print(
                f"{'SURVIVED' if alive else 'caught  '}  {fault.name:52} {fault.test.removeprefix('tests/')}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
