"""The kernels that write a cache on an emulated GPU: pytest --emulate sm_100a tests/emulated/test_kv_cache_sm100.py"""

from tests.emulated.kv_cache_checks import (  # noqa: F401
    test_append_equals_the_reference,
    test_empty_slots_of_a_batch_are_left_alone,
    test_no_tokens_of_a_kind,
    test_one_call_appends_and_attends,
    test_one_call_over_pages,
    test_positions_that_the_tables_lack_are_nan,
    test_rotary_may_begin_elsewhere,
    test_store_nowhere_and_outside,
    test_store_writes_its_slots_alone,
    test_tokens_of_no_sequence,
    test_what_has_no_place_is_not_written,
)
