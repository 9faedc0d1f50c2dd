"""The planning kernel on an emulated Hopper: pytest --emulate sm_90a tests/emulated/test_plan_sm90.py"""

from tests.emulated.plan_checks import (  # noqa: F401
    test_batch_sizes,
    test_corrected_targets_fill_whole_rounds,
    test_corrections_beyond_32_bits_equal_the_specification,
    test_decode_batches_equal_the_specification,
    test_every_tile_is_handed_out_once_without_a_plan,
    test_every_work_tile_is_handed_out_once,
    test_no_bit_of_a_plan_depends_on_the_order_of_events,
    test_nothing_is_merged_before_the_forward_has_ended,
    test_nothing_is_merged_where_nothing_is_split,
    test_packed_batches_equal_the_specification,
    test_plans_under_a_key_mask_equal_the_specification,
    test_split_sequences_are_merged_and_others_left_alone,
)
