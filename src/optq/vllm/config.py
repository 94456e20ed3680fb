# SPDX-License-Identifier: Apache-2.0
"""The quantization method "optq" of vLLM: which checkpoints are its own, and which of a model's layers are packed."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import vllm
import vllm._custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from optq.config.gptq import GPTQConfig
from optq.device.triton import OLDEST_CAPABILITY

from .claim import why_not_by_itself
from .experts import PackedExpertsMethod
from .linear import PackedLinearMethod

logger = init_logger("vllm.optq")  # vLLM shows what is logged below its own name

METHOD = "optq"
"""What `--quantization` calls it."""

LEAST_CAPABILITY = 10 * OLDEST_CAPABILITY[0] + OLDEST_CAPABILITY[1]
"""Of Nvidia's GPUs, as vLLM writes it: the Triton kernel's."""


OWN_PRODUCT = "cpu_gemm_wna16"
"""vLLM's operator for packed weights on CPUs; importing `vllm._custom_ops` loads what its build has for this one."""

UNSERVED = {
    model_type: f"vLLM's {model_type} rearranges q, k and v while it loads, which packed tensors do not survive"
    for model_type in ("llama4", "llama4_text", "bloom")
}


class OptqConfig(QuantizationConfig):
    """vLLM's quantization config for GPTQ checkpoints that optq serves.

    Args:
        stated: quantization_config of its config.json.
    """

    def __init__(self, stated: dict[str, Any]) -> None:
        super().__init__()
        self.stated = GPTQConfig.from_dict(stated)
        self._packed: set[str] = set()
        self._dense: set[str] = set()

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OptqConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """ "optq" if the checkpoint is to be served by it, or None: it is asked before vLLM's own methods are."""
        if str(hf_quant_cfg.get("quant_method")).lower() != "gptq" or user_quant not in (None, METHOD):
            return None
        unserved = UNSERVED.get(getattr(hf_config, "model_type", ""))
        if user_quant == METHOD:
            if unserved is not None:
                raise ValueError(f"--quantization optq was asked for; {unserved}. Leave it out.")
            logger.info_once("optq serves this checkpoint, as --quantization asks for.")
            return METHOD
        if unserved is not None:
            return None
        reader = "vllm-cpu" if current_platform.is_cpu() else "vllm"
        place = getattr(hf_config, "name_or_path", None) or None
        reason = why_not_by_itself(place, hf_quant_cfg, reader, vllm.__version__.partition("+")[0])
        if reason is None and reader == "vllm-cpu" and not hasattr(torch.ops._C, OWN_PRODUCT):
            reason = "its product of packed weights is not built for this CPU, which has no AVX-512"
        if reason is None:
            return None
        logger.info_once("optq serves this checkpoint, since vLLM by itself does not read it right: %s", reason)
        return METHOD

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drops nothing: g_idx says which group a column belongs to."""
        return WeightsMapper()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Read from the headers which of the checkpoint's linears are packed."""
        names = list(get_safetensors_params_metadata(model_name, revision=revision))
        self._packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
        self._dense = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._packed = _renamed(self._packed, "qweight", hf_to_vllm_mapper)
        self._dense = _renamed(self._dense, "weight", hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if current_platform.is_cpu():
            _ask_for_tiles()
        if isinstance(layer, RoutedExperts):
            if self._has_packed_experts(prefix):
                return PackedExpertsMethod(layer.moe_config, self.stated)
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, LinearBase):
            if self._is_dense(prefix):
                return UnquantizedLinearMethod()
            return PackedLinearMethod(prefix, self.stated)
        if isinstance(layer, ParallelLMHead):
            if prefix in self._packed or (not self._packed and self.stated.lm_head):
                return PackedLinearMethod(prefix, self.stated)
            return UnquantizedEmbeddingMethod()
        return None

    def _is_dense(self, prefix: str) -> bool:
        """Whether nothing of a linear is packed; of one that the checkpoint calls otherwise, what arrives tells."""
        names = list(self._linears_of(prefix))
        if any(name in self._packed for name in names):
            return False
        if not self._packed:  # no headers were to be had
            return all(self.stated.scheme_for(name) is None for name in names)
        return all(name in self._dense for name in names)

    def _linears_of(self, prefix: str) -> Iterable[str]:
        """The checkpoint's linears that a linear of vLLM is made of."""
        parent, _, last = prefix.rpartition(".")
        start = f"{parent}." if parent else ""
        return (f"{start}{part}" for part in self.packed_modules_mapping.get(last, [last]))

    def _has_packed_experts(self, prefix: str) -> bool:
        if not self._packed:
            return self.stated.scheme_for(f"{prefix}.0.gate_proj") is not None
        inside = prefix.removesuffix(".routed_experts")
        return any(name.startswith(f"{inside}.") for name in self._packed)


@cache
def _ask_for_tiles() -> None:
    """Ask Linux for the registers of AMX, where the CPU has some, as a dense product of bfloat16 does.

    vLLM's attention in bfloat16 takes it that a linear has asked already. Ours do not, and the process would end with
    an illegal instruction.
    """
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cpu")
    square @ square


def _renamed(linears: set[str], tensor: str, mapper: WeightsMapper) -> set[str]:
    """The linears as vLLM calls them: the rules are about names of tensors."""
    return {name.removesuffix(f".{tensor}") for name in mapper.apply_list([f"{name}.{tensor}" for name in linears])}


def register() -> None:
    """Make vLLM know the method. vLLM may call it several times, in each of its processes."""
    register_quantization_config(METHOD)(OptqConfig)
