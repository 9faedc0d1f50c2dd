"""The combine kernel on an emulated GPU: pytest --emulate sm_100a tests/emulated/test_combine_sm100.py"""

from tests.emulated.combine_checks import (  # noqa: F401
    test_any_strides_and_views,
    test_bits_are_a_function_of_the_row_alone,
    test_combine_equals_the_reference,
    test_nan_is_not_hidden,
    test_padding_rows_are_zero,
)
