"""For PaddleFormers' `custom_register_path`: executed in every process of a run, before the model is built.

`python -m paddle_vl_sp plugin-path` prints where this file is. PADDLE_VL_SP=0 makes it do nothing.
"""

import os

from paddle_vl_sp.formers import apply_to_qwen3_vl

report = apply_to_qwen3_vl()
if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
    print(report, flush=True)
