"""What PaddleFormers' methods must do for ours to take their place, tried out on the CPU with tiny tensors."""

from paddle_vl_sp.formers.contracts.additions import adds_the_rows_of_its_rank
from paddle_vl_sp.formers.contracts.cut import equals_ours_on_text, sees_the_cut
from paddle_vl_sp.formers.contracts.embedding import merges_as_ours
from paddle_vl_sp.formers.contracts.fleet import hands_on_what_it_is_given, lets_its_layer_add
from paddle_vl_sp.formers.contracts.head import has_one_weight
from paddle_vl_sp.formers.contracts.ignored import never_reads
from paddle_vl_sp.formers.contracts.text import asks_for_every_level, cuts_the_flattened_batch
from paddle_vl_sp.formers.contracts.tower import encodes_item_by_item, has_unsummed_head_norms
from paddle_vl_sp.formers.contracts.whole import equals_ours, fails_on_videos

__all__ = [
    "adds_the_rows_of_its_rank",
    "asks_for_every_level",
    "cuts_the_flattened_batch",
    "encodes_item_by_item",
    "equals_ours",
    "equals_ours_on_text",
    "fails_on_videos",
    "hands_on_what_it_is_given",
    "has_one_weight",
    "has_unsummed_head_norms",
    "lets_its_layer_add",
    "merges_as_ours",
    "never_reads",
    "sees_the_cut",
]
