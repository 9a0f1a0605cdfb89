"""Linear-attention operators for JAX: six recurrences, chunked and trainable, packed, with initial and final states."""

from jaxhybrid_kernels import decode
from jaxhybrid_kernels.api import IMPLEMENTATIONS, linear_attention
from jaxhybrid_kernels.context import context_dplr_attention, context_linear_attention
from jaxhybrid_kernels.context_convolution import context_short_convolution
from jaxhybrid_kernels.debug import debug_checks
from jaxhybrid_kernels.dplr import dplr_attention, dplr_attention_step
from jaxhybrid_kernels.float8_swiglu import float8_swiglu
from jaxhybrid_kernels.kl_sums import KLSums, kl_sums
from jaxhybrid_kernels.layer_token import Places, Steps, linear_attention_token
from jaxhybrid_kernels.recurrent import linear_attention_step
from jaxhybrid_kernels.row_product import row_product
from jaxhybrid_kernels.short_convolution import short_convolution, short_convolution_step

__all__ = [
    "IMPLEMENTATIONS",
    "KLSums",
    "Places",
    "Steps",
    "context_dplr_attention",
    "context_linear_attention",
    "context_short_convolution",
    "debug_checks",
    "decode",
    "dplr_attention",
    "dplr_attention_step",
    "float8_swiglu",
    "kl_sums",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_token",
    "row_product",
    "short_convolution",
    "short_convolution_step",
]
