"""RWKV-7's recurrence: a diagonal plus low-rank transition of the state."""

from jaxhybrid_kernels.dplr.api import dplr_attention
from jaxhybrid_kernels.dplr.recurrent import dplr_attention_step

__all__ = ["dplr_attention", "dplr_attention_step"]
