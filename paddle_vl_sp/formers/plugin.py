"""For PaddleFormers' `custom_register_path`: executed in every process of a run, before the model is built.

`python -m paddle_vl_sp plugin-path` prints where this file is. The switches are environment variables, since a YAML
takes no keys but PaddleFormers' own:

PADDLE_VL_SP=0                  nothing is changed
PADDLE_VL_SP_FAMILIES=a,b       only these families of models
PADDLE_VL_SP_STRICT=0           code of PaddleFormers that is not known is left alone instead of an error
PADDLE_VL_SP_PROBE=never        ... without trying first whether it does all that is needed of it
PADDLE_VL_SP_VISION_DP=1        tensor-parallel ranks share the work of a replicated vision tower
PADDLE_VL_SP_VISION_DP=data     data-parallel and sharding ranks share the work of their vision towers
PADDLE_VL_SP_CONTEXT_PARALLEL=auto   the ranks of sep_parallel_size share each sequence; or gather, ring, ulysses
PADDLE_VL_SP_LOADER_PLANS=1     the data loader plans
PADDLE_VL_SP_REPORT=1           a VisualReport in every trainer
PADDLE_VL_SP_AUDIT=1, strict    the gradients are audited before the first step, also with PADDLE_VL_SP=0
"""

from paddle_vl_sp.formers.patch import apply_to_paddleformers
from paddle_vl_sp.formers.unread import plugin_runs
from paddle_vl_sp.formers.workflow import plan_if_asked
from paddle_vl_sp.settings import CONTEXT_PARALLEL, FAMILIES, STRICT, VISION_DP, is_on, names_in, setting

plugin_runs()
asked = setting(CONTEXT_PARALLEL)
apply_to_paddleformers(
    families=names_in(FAMILIES),
    strict=is_on(STRICT),
    vision_dp={"0": False, "1": True}.get(setting(VISION_DP), setting(VISION_DP)),
    context_parallel=None if asked == "0" else asked,
)
from paddle_vl_sp.formers.callback import report_if_asked  # noqa: E402 - its trainer, after the call that asks for it

plan_if_asked()
report_if_asked()
