"""jaxhybrid's exports with their own code (`model_type` jaxhybrid), served by vLLM.

vLLM runs no code out of a model's folder: the PyTorch layers that it runs are this package's, in `exported`.
"""

ARCHITECTURE = "JaxHybridForCausalLM"


def register() -> None:
    """Called by vLLM in each of its processes, more than once maybe."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .exported.configuration_jaxhybrid import JaxHybridConfig
    from .refusals import Check

    AutoConfig.register(JaxHybridConfig.model_type, JaxHybridConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "jaxhybrid_vllm.model:JaxHybridForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Check
