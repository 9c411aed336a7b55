"""Attention over packed sequences of text and video segments, and its element-wise neighbours."""

from .attention import merge_attention_states, segment_attention
from .backends import Attention
from .kv_cache import SegmentKVCache
from .layout import (
    Segment,
    SegmentMask,
    SequenceLayout,
    blended_sees_all,
    clean_sees_clean,
    full,
    layer_isolated,
    prompt_isolated,
)
from .modulation import adaln_modulate, gated_residual, modulate, qk_norm
from .plan import AttentionPlan, plan_attention
from .registry import BackendInfo, BackendUnavailableError, list_backends, use_backend

__all__ = [
    "Attention",
    "AttentionPlan",
    "BackendInfo",
    "BackendUnavailableError",
    "Segment",
    "SegmentKVCache",
    "SegmentMask",
    "SequenceLayout",
    "adaln_modulate",
    "blended_sees_all",
    "clean_sees_clean",
    "full",
    "gated_residual",
    "layer_isolated",
    "list_backends",
    "merge_attention_states",
    "modulate",
    "plan_attention",
    "prompt_isolated",
    "qk_norm",
    "segment_attention",
    "use_backend",
]
