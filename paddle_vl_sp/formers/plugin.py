"""For PaddleFormers' `custom_register_path`: executed in every process of a run, before the model is built.

`python -m paddle_vl_sp plugin-path` prints where this file is. PADDLE_VL_SP=0 makes it do nothing, and
PADDLE_VL_SP_REPORT=1 puts a VisualReport into every trainer.
"""

from paddle_vl_sp.formers.callback import report_if_asked
from paddle_vl_sp.formers.patch import apply_to_qwen3_vl

apply_to_qwen3_vl()
report_if_asked()
