"""The budget of cycles of a token's product, for every type of codes and every kind of CPU."""

import cpu_budget
import pytest

# Cycles for 64 weights, by llvm-mca 22. A change that helps one CPU must not cost another one.
BUDGETS = {
    "trellis2": (10.69, 8.79, 8.99, 3.96, 4.51, 5.21, 27.10),
    "trellis3": (15.96, 14.92, 12.19, 4.17, 4.70, 5.37, 31.53),
    "nf4": (8.57, 5.45, 7.29, 5.72, 5.28, 5.97, 19.89),
    "mxfp4": (6.79, 4.26, 5.28, 2.79, 3.18, 5.10, 19.15),
    "int6": (8.97, 6.57, 7.33, 2.76, 3.02, 4.82, 48.89),
    "int8": (4.59, 4.28, 7.35, 2.76, 2.62, 5.49, 16.86),
}
TOLERANCE = 1.04


@pytest.mark.skipif(cpu_budget.MCA is None, reason="there is no llvm-mca 22")
@pytest.mark.parametrize("quant_type", BUDGETS)
def test_no_cpu_needs_more_cycles_than_budgeted(quant_type):
    counts = {cpu: cpu_budget.counted(quant_type, cpu).cycles for cpu in cpu_budget.PROCESSORS}
    budgets = dict(zip(cpu_budget.PROCESSORS, BUDGETS[quant_type], strict=True))
    assert not {
        cpu: (count, budgets[cpu])
        for cpu, count in counts.items()
        if count > TOLERANCE * budgets[cpu]
    }


def test_each_type_of_codes_has_a_budget():
    assert BUDGETS.keys() == cpu_budget.UNITS.keys()
