"""The command line: each verb is a few lines over the Python API."""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jaxhybrid.errors import ConfigError, JaxHybridError, exit_code

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a pretrained softmax transformer into a hybrid linear-attention model.\n\n"
    "A run is one YAML config and one folder. `jaxhybrid run configs/demo.yaml` does all stages; the verbs below do "
    "one each, in this order: align, score (for select.method=kl_guided), select, distill, finetune, evaluate, export, "
    "report. Every verb goes on where it was stopped. Settings are changed on the command line as key=value, for "
    "example: jaxhybrid run configs/demo.yaml select.budget=0.5 seed=3\n\n"
    "Before a run, `plan` says what becomes of each layer, and what the stages take on TPUs or GPUs that are not here.",
)

Config = Annotated[Path, typer.Argument(help="YAML config of the run, or the folder of one that exists.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings over the config, as key=value.", metavar="[KEY=VALUE]...")
]
ModelFolder = Annotated[
    str, typer.Argument(help="An exported folder, or a teacher (folder, hub id, GGUF file, demo:smollm2-135m).")
]


Opened = Any  # a Pipeline


def verb(work: Callable[..., None]) -> Callable[..., None]:
    """A command over an open pipeline: `work` takes it and options of its own; all such verbs have the options here."""

    def command(
        config: Config,
        overrides: Overrides = None,
        coordinator: Annotated[
            str | None,
            typer.Option(
                envvar=["JAXHYBRID_COORDINATOR", "JAX_COORDINATOR_ADDRESS"],
                help="HOST:PORT of the first of several processes; TPU pods, GKE and Slurm tell by themselves.",
            ),
        ] = None,
        processes: Annotated[
            int | None,
            typer.Option(
                envvar="JAXHYBRID_PROCESSES", min=1, help="How many processes; 1: by itself, whatever is there."
            ),
        ] = None,
        process: Annotated[
            int | None, typer.Option(envvar="JAXHYBRID_PROCESS", min=0, help="Which one this is, from 0.")
        ] = None,
        **options: Any,
    ) -> None:
        settings = read_settings(config, overrides)
        # Imported here so that --help does not wait for JAX.
        from jaxhybrid import hosts

        hosts.initialize(coordinator, processes, process)
        from jaxhybrid.pipeline import Pipeline

        with Pipeline(settings) as opened:
            work(opened, **options)

    common = [p for p in signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    _, *own = signature(work).parameters.values()
    first, second, *rest = common
    parameters = [first, second, *own, *rest]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return app.command(work.__name__, help=work.__doc__)(command)


def read_settings(config: Path, overrides: list[str] | None) -> "RunConfig":  # type: ignore[name-defined] # noqa: F821
    """The settings in a YAML file, or those of a run folder, wherever it has been moved to."""
    from jaxhybrid.settings.read import load_config

    if not config.is_dir():
        return load_config(config, overrides or [])
    if not (config / "config.yaml").exists():
        raise ConfigError(f"{config} is neither a YAML config nor a run folder: it has no config.yaml.")
    renamed = any(override.startswith("name=") for override in overrides or [])
    folder = "run_dir=" if renamed else f"run_dir={json.dumps(str(config))}"  # none: the new name's own
    return load_config(config / "config.yaml", [folder, *(overrides or [])])


@verb
def run(
    p: Opened,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="Take finished align and score stages over from another run folder, where settings agree."),
    ] = None,
) -> None:
    """All stages in order, skipping what is done."""
    for other in reuse or []:
        p.reuse(other)
    p.run()


@verb
def align(p: Opened) -> None:
    """Stage 1: linear mixers learn to give the teacher's attention outputs."""
    p.align()


@verb
def score(
    p: Opened,
    candidates: Annotated[
        str,
        typer.Option(
            help="Layers to score in this process, FIRST:END as Python slices; several processes share a run."
        ),
    ] = "",
    merge: Annotated[
        list[Path] | None, typer.Option(help="Take finished scores over from other run folders first.")
    ] = None,
) -> None:
    """Importance of each layer, for select.method=kl_guided: KL to the teacher when that layer alone is softmax."""
    for other in merge or []:
        p.merge_scores(other)
    p.score(parse_candidates(candidates, p.models.depth))


@verb
def select(
    p: Opened,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Choose nothing: print how far the run's rankings, its methods' and published layers agree.",
        ),
    ] = False,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="METHOD", help="With --compare: this method of select.method, too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --compare: print JSON, for programs.")] = False,
) -> None:
    """The layers that stay softmax, by select.method; writes layers.json.

    With --compare nothing is chosen: it prints how far the run's rankings, those of methods named --with and
    the published layers for a teacher of that depth agree, as overlap of the sets and rank correlation.
    """
    if not compare:
        if others or as_json:
            raise ConfigError("--with and --json belong to --compare.")
        p.select()
        return
    from jaxhybrid import hosts
    from jaxhybrid.report.screen import print_comparison

    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what is said on the way is no JSON
        found = p.compare(others or [])
    if hosts.is_first():
        print(json.dumps(found, indent=2)) if as_json else print_comparison(found)


@verb
def distill(p: Opened) -> None:
    """Stage 2: the hybrid learns the teacher's distribution (KL)."""
    p.distill()


@verb
def finetune(p: Opened) -> None:
    """Stage 3: cross entropy, usually at a longer context."""
    p.finetune()


@verb
def evaluate(p: Opened) -> None:
    """Perplexity, KL, recall and tasks of teacher and student; writes evaluation.json and prints a table."""
    from jaxhybrid import hosts
    from jaxhybrid.report import evaluation_table

    hosts.say(evaluation_table(p.evaluate()))


def _known_format(asked: str) -> str:
    """Before a run is opened: one that is not written costs no loading, and leaves nothing."""
    from jaxhybrid.settings.export_format import check_format

    return asked and check_format(asked)


@verb
def export(
    p: Opened,
    to: Annotated[str, typer.Option(help="Folder to write; default export.folder or RUN/export.")] = "",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the folder whatever it holds; without it, only an earlier export.")
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            callback=_known_format,
            help="native: an architecture that transformers has itself; remote-code: with the model's own code; auto: "
            "native where that is exact, else it says what stands against it. fla and gguf are not written: asked for "
            "one, it says why and what to take instead. Default export.format.",
        ),
    ] = "",
    push_to_hub: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Upload it, too, to this repository of the Hugging Face hub.")
    ] = "",
) -> None:
    """A Hugging Face folder that plain transformers loads."""
    from jaxhybrid import hosts
    from jaxhybrid.export.hub import push, require_token

    if push_to_hub:
        hosts.by_first(lambda: require_token(push_to_hub), "token of the hub")
    folder = p.export(to or None, overwrite, format)
    hosts.say(f"exported to {folder}")
    if push_to_hub:
        hosts.say(f"uploaded: {hosts.by_first(lambda: push(folder, push_to_hub), 'upload')}")


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """One HTML page and PNGs of everything the run measured."""
    settings = read_settings(config, overrides)
    from jaxhybrid.report import write_report
    from jaxhybrid.run_folder import folder_of

    print(f"report: {write_report(folder_of(settings))}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders that have an evaluation.")],
) -> None:
    """Evaluations of several runs; those that differ in their seed alone become one row, with an interval.

    Compared are perplexity, KL and agreement in rows of evaluate.sequence_length, recall, tasks with written answers
    and lm-eval. Figures of further lengths and by position are in each run's report.
    """
    from jaxhybrid.report.compare import compare_runs
    from jaxhybrid.report.table import aligned

    print(aligned(*compare_runs(folders), left=3))


@app.command()
def generate(
    folder: ModelFolder,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; they are answered together.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 draws as the model says.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw only from the k most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the most likely tokens that together are this likely.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw only from tokens at least this share as likely as the most likely one.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens that occurred become less likely. Default: as generation_config.json says."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of drawing; prompt i takes seed + i.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt through the chat template.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Weights and computation: float32, or bfloat16 with half the memory.")
    ] = "float32",
    tensor: Annotated[int, typer.Option(help="Devices that share the model's heads, MLPs and vocabulary.")] = 1,
) -> None:
    """Text from a model, in JAX, on the hybrid state. One answer is printed as it comes, several when all are there."""
    from jaxhybrid.complete import complete

    def show(_: int, piece: str) -> None:
        if len(prompt) == 1:
            print(piece, end="", flush=True)

    answers = complete(
        folder,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        chat=chat,
        dtype=dtype,
        tensor=tensor,
        on_text=show,
    )
    print("\n".join(answers) if len(prompt) > 1 else "")


@app.command()
def serve(
    folder: ModelFolder,
    beside: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, such as the teacher; the page asks both.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="The model's name in the API; default: as given. Twice with --beside.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default is for this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="JAXHYBRID_API_KEY", help="Refuse requests without it. Better as the variable: others see arguments."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts at once, of each model.")] = 8,
    context: Annotated[int, typer.Option(help="Most tokens of a prompt and its answer together.")] = 4096,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer; default: the context.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot, of each model.")] = 64,
    request_seconds: Annotated[float, typer.Option(help="Longest time for an answer, waiting included.")] = 600,
    grace_seconds: Annotated[float, typer.Option(help="What texts get to end in after SIGTERM or Ctrl-C.")] = 30,
    dtype: Annotated[
        str, typer.Option(help="Weights and computation: float32, or bfloat16 with half the memory.")
    ] = "float32",
    tensor: Annotated[int, typer.Option(help="Devices that share the model's heads, MLPs and vocabulary.")] = 1,
) -> None:
    """A server with OpenAI's API, and a page to chat with one model or two side by side. Needs the `serve` extra.

    For example: jaxhybrid serve runs/my-model/export --beside HuggingFaceTB/SmolLM2-135M-Instruct
    Then open http://127.0.0.1:8000, or point a client of OpenAI's API at http://127.0.0.1:8000/v1
    """
    try:
        from jaxhybrid.serve.limits import Limits
        from jaxhybrid.serve.server import serve as run_server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(
            "serve needs starlette, uvicorn and prometheus-client: `uv sync --extra serve`, or pip install them."
        ) from error
    folders = [folder, *([beside] if beside else [])]
    names = name or folders
    if len(names) != len(folders):
        raise ConfigError(f"{len(names)} names for {len(folders)} models; give --name once for each, or not at all.")
    limits = Limits(
        slots=slots,
        context=context,
        max_new_tokens=min(max_new_tokens or context, context),
        queue=queue,
        request_seconds=request_seconds,
        grace_seconds=grace_seconds,
    )
    run_server(folders, names, limits, port=port, host=host, api_key=api_key, dtype=dtype, tensor=tensor)


@app.command()
def benchmark(
    folder: ModelFolder,
    tasks: Annotated[
        list[str], typer.Argument(help="Tasks of lm-eval, such as arc_easy; `lm-eval ls tasks` lists them.")
    ],
    task_folder: Annotated[Path | None, typer.Option(help="A folder with task files (YAML) of your own.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before a question; default: the task's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once; rounded up to a multiple of the devices.")] = 8,
    dtype: Annotated[str, typer.Option(help="Compute type: float32 or bfloat16.")] = "float32",
    prepend_bos: Annotated[
        bool | None, typer.Option(help="Begin texts with the BOS token; default: as the tokenizer does by itself.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    fsdp: Annotated[int, typer.Option(help="Devices that share the parameters; -1: all. The rest hold copies.")] = -1,
) -> None:
    """Tasks of lm-evaluation-harness, in JAX on all devices. Needs the `eval` extra, and mostly a network."""
    try:
        from jaxhybrid.evaluate.harness import run_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("benchmark needs lm-eval: `uv sync --extra eval`, or `pip install lm-eval`.") from error
    import jax

    from jaxhybrid.complete import open_model
    from jaxhybrid.files import write_json
    from jaxhybrid.model.partition import make_mesh

    mesh = make_mesh(data=1 if fsdp == -1 else -1, fsdp=fsdp)
    with jax.set_mesh(mesh):
        model, vocabulary, ends = open_model(folder, prepend_bos, mesh)
        print(f"texts begin with {vocabulary.beginning}")
        figures = run_tasks(
            model,
            vocabulary,
            ends,
            tasks,
            task_folder=task_folder,
            shots=shots,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
        )
    for task, values in figures.items():
        for name, value in values.items():
            print(f"{task:24} {name:28} {value:.4f}")
    if output:
        write_json(output, figures)


@app.command()
def parity(
    folder: ModelFolder,
    text: Annotated[
        str, typer.Option(help="A text source as in data.train; pydoc is help topics of Python.")
    ] = "pydoc",
    rows: Annotated[int, typer.Option(help="Rows of text run together; the first one is also run alone.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    dtype: Annotated[str, typer.Option(help="Compute type of the forms: float32 or bfloat16.")] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let transformers run the Python files of an export.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """How far a model's forms differ: training, decoding, and transformers (with the `torch` extra).

    Compared are log probabilities of the next token, in nats, with those of the training form in float32. The last
    column is how far a row's depend on the rows beside it.
    """
    from jaxhybrid.complete import open_model
    from jaxhybrid.data.sources import open_source
    from jaxhybrid.evaluate.parity import parity, parity_rows, rows_of
    from jaxhybrid.report.table import aligned

    model, vocabulary, _ = open_model(folder)
    texts = (document for part in open_source(text).parts for document in part())
    documents = (vocabulary.prompt(document) for document in texts if document)
    found = parity(model, rows_of(documents, rows, length), dtype, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(aligned(*parity_rows(found), left=1))
    for form, reason in found["left_out"].items():
        print(f"{form}: left out, {reason}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare parameters and checkpoints with their checksums, too; reads all of them.")
    ] = False,
) -> None:
    """Where a run is: stages, figures, disk, results, and the command that comes next."""
    from jaxhybrid.report.inspection import inspect_run
    from jaxhybrid.report.screen import print_run

    found = inspect_run(folder, verify)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_run(found)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    verify: Annotated[bool, typer.Option(help="Compare all files with their checksums, too; reads them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Which server loads an export, why another does not, what to change, and what a sequence takes in memory.

    Nothing is run: what vLLM, SGLang, llama.cpp, TGI and tpu-inference load is data with sources; docs/serving.md says
    what of it was tried.
    """
    from jaxhybrid.plan.servers import check, check_text

    found = check(folder, verify)
    print(json.dumps(found, indent=2) if as_json else check_text(found))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="Chips to plan for, may be repeated. A TPU slice by its sides, v5p:4x4x4 (v4, v5e, v5p, v6e, tpu7x): "
            "every stage's step is compiled for it, which takes minutes the first time. GPUs by their number, h200:8 "
            "(h100, h200, b200): estimated, with 95 % of their memory, which the command line has "
            "JAX take (XLA_PYTHON_CLIENT_MEM_FRACTION)."
        ),
    ] = None,
    stages: Annotated[list[str] | None, typer.Option("--stage", help="This stage alone; may be repeated.")] = None,
    model_only: Annotated[
        bool, typer.Option(help="What becomes of each layer, and nothing else: no topology is needed.")
    ] = False,
    suggest: Annotated[
        bool,
        typer.Option(
            help="Search mesh, remat and gradient_accumulation for the fastest that fits; minutes. Each stage's "
            "settings are for its own verb: `run` has one mesh."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Stages compiled at a time, up to 3.7 GiB of memory each.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Know before you pay: memory, exchanges, time and disk of a run on chips that are not here.

    Of the teacher only its config.json is read, and no text. The config's mesh says how the devices of a topology are
    used. For example: jaxhybrid plan configs/qwen2.5-3b-instruct.yaml --topology v5p:4x4x4 mesh.fsdp=32 mesh.context=2
    """
    settings = read_settings(config, overrides)
    if model_only == bool(topology):
        raise ConfigError("plan needs either --topology, such as --topology v5p:4x4x4, or --model-only.")
    if model_only and (stages or suggest):
        raise ConfigError("--stage and --suggest are of a topology's steps; leave them out of --model-only.")
    from jaxhybrid.plan import print_plan

    print_plan(settings, topology or [], stages or [], jobs, as_json, suggest)


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    on: Annotated[
        Literal["gke", "tpu-vm", "slurm"],
        typer.Option(help="Google Kubernetes Engine, TPU VMs as a queued resource, or Slurm with GPUs."),
    ] = "gke",
    topology: Annotated[
        str, typer.Option(help="A TPU slice as KIND:SIDES, or GPUs as h100:16 (nodes of 8) or h100:4x4.")
    ] = "v5p:4x4x4",
    slices: Annotated[int, typer.Option(min=1, help="TPU slices, joined by the network; mesh.data spans them.")] = 1,
    zone: Annotated[str | None, typer.Option(help="Google Cloud zone that has such TPUs, such as us-east5-a.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Name of the container image; its Dockerfile is among the files.")
    ] = None,
    bucket: Annotated[str | None, typer.Option(help="Cloud Storage bucket for results, mounted on every host.")] = None,
    nfs: Annotated[
        str | None, typer.Option(help="Instead of a bucket: SERVER:/PATH of Filestore or another NFS server.")
    ] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="TPUs at a lower price that may be taken away at any time.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the files; default launch/NAME.")] = None,
) -> None:
    """Files that start a run on a TPU slice or on GPU nodes, to look at and to run; docs/launch.md is the guide.

    Writes them and starts nothing.
    """
    settings = read_settings(config, overrides)
    from jaxhybrid.launch.job import cloud_job, slurm_job
    from jaxhybrid.launch.slices import find_slice
    from jaxhybrid.launch.write import write_job

    where = find_slice(topology)
    if on == "slurm":
        given = {"--slices": slices != 1, "--zone": zone, "--image": image, "--bucket": bucket, "--nfs": nfs}
        if unused := [option for option, value in (given | {"--spot": spot}).items() if value]:
            raise ConfigError(f"{', '.join(unused)}: not for --on slurm; leave it out.")
        job = slurm_job(settings, where)
    else:
        job = cloud_job(settings, where, slices, image=image, bucket=bucket, nfs=nfs, zone=zone, spot=spot)
    folder = output or Path("launch") / settings.name
    for path in write_job(job, on, folder):
        print(path)
    print(f"next: read {folder}/{'job.sh' if on == 'slurm' else 'pod.sh'}, which says at its head how it is started")


@app.command("settings")
def settings_() -> None:
    """Every setting of a config, with type, default and meaning."""
    from jaxhybrid.settings.fields import describe

    print(describe())


def parse_candidates(text: str, depth: int) -> range | None:
    """'3:10' -> layers 3 to 9, '20:' -> from 20 on, '7' -> layer 7; '' -> None, all of them."""
    if not text:
        return None
    first, colon, end = text.partition(":")
    try:
        start = int(first) if first else 0
        stop = int(end) if end else (depth if colon else start + 1)
    except ValueError as error:
        raise ConfigError(f"--candidates {text!r} is not FIRST:END, such as 0:10.") from error
    if not 0 <= start < stop <= depth:
        raise ConfigError(
            f"--candidates {text}: the model's layers are 0 to {depth - 1}, so use 0 <= FIRST < END <= {depth}."
        )
    return range(start, stop)


def main() -> None:
    """Entry point: an error the user can act on is one message and exit code 2 (else: docs/hosts.md)."""
    # orbax tells every step of a save, and a failed one with several stack traces before it raises the error itself.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
    # Of a GPU, before JAX is there: JAX would take three quarters, and plans count with this much (plan/topology.py).
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        app()
    except JaxHybridError as error:
        if not error.shared or _hosts().is_first():
            print(f"error: {error}", file=sys.stderr)
        else:
            print("error: the log of the first process says why all of them end", file=sys.stderr)
        _leave(error)
    except SystemExit as end:  # typer's, of a whole command too
        if end.code:
            _leave(end)
        raise
    except BaseException as error:
        if "jaxhybrid.hosts" in sys.modules:
            _hosts().await_death(error)
        traceback.print_exc()
        _leave(error)


def _hosts() -> Any:
    from jaxhybrid import hosts

    return hosts


def _leave(error: BaseException) -> None:
    if "jaxhybrid.hosts" in sys.modules:
        _hosts().leave(error)
    sys.exit(exit_code(error))
