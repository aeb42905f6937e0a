"""The machine code of the kernels for cards that are not here.

`python tests/kernels/gpu/assembly.py` prints the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixchat.planning.machine_speeds import INSTRUCTIONS

SCRIPT = Path(__file__).with_name("assembly.py")
# It has two tables, and is bound by arithmetic, which fewer threads do as fast.
LEAST_OCCUPANCY = {
    "product trellis3": 0.3,
    # It makes 16 bits of 8 in registers, and loads two tiles ahead meanwhile.
    "attend qwen3 in 8 bits": 0.3,
    # Triton 3.7, which PyTorch 2.13 brings, takes 67 registers, and Triton 3.9 takes 64.
    "attend gpt-oss in 8 bits": 0.4,
    # One program has a multiprocessor for itself.
    "delta_rule qwen3.6": 0.3,
    # Heads of 256 columns leave fewer registers.
    "attend qwen3-next": 0.3,
    # The sums of latents of 512 columns take half of a thread's registers.
    "attend glm-4.7-flash": 0.2,
    "attend glm-4.7-flash in 8 bits": 0.2,
    "prompt attend glm-4.7-flash": 0.2,
    # They are bound by arithmetic, for which matrix units need no other threads.
    "prompt attend qwen3": 0.1,
    "prompt attend qwen3 in 8 bits": 0.1,
    "prompt attend gpt-oss": 0.1,
}


# Cards of one generation have one instruction set: what one of them has compiled is left out of the
# other's.
CALLS = {
    "sm_86": "^product|mixtral (trellis2|none)|qwen3 nf4|gpt-oss mxfp4|dequantize nf4|route glm4"
    "|add_norm|heads (qwen|glm)|^delta|gated_convolution|head_products (none|int8|nf4)",
    "sm_80": "^(prompt )?attend|^store|^heads olmoe",
    "sm_75": "^attend qwen3 in|^prompt attend gpt-oss|^add_norm of|^product nf4",
    "sm_90": "^attend qwen3 in|^prompt attend gpt-oss|^add_norm of|^product nf4",
    "sm_120": "^product nf4",
    "gfx1100": "^product nf4",
    "gfx942": "^product nf4",
}


# Of a thread in the loop of a product of one row.
WEIGHTS = {"nf4": 128, "mxfp4": 128, "int6": 64, "trellis2": 64, "trellis3": 64}


def instructions(row: dict[str, Any]) -> float:
    """The instructions of a product for a weight, on the generation of cards that plans count."""
    quant_type = row["call"].split()[-1]
    is_product = row["kernel"] in ("_product", "_experts_up", "_experts_down")
    if not is_product or quant_type not in WEIGHTS or row["card"] != "sm_86":
        return 0.0
    return float(row["loop"] / WEIGHTS[quant_type])


def planned_instructions(row: dict[str, Any]) -> float:
    return 1.05 * INSTRUCTIONS.get(row["call"].split()[-1], 0.0)


def complaints(row: dict[str, Any]) -> list[str]:
    least = LEAST_OCCUPANCY.get(row["call"], 0.5)
    # Norms and the router read no codes.
    reads_codes = row["kernel"] in (
        "_product",
        "_head_products",
        "_experts_up",
        "_experts_down",
        "_dequantize",
    )
    found = {
        "spills": row["spills"] > 0,
        "loads codes in less than 128 bits": reads_codes and row["wide_loads"] < 3,
        "loads bytes": row["narrow_loads"] > 0,
        "uses shared memory in its loop": reads_codes and row["shared_in_loop"] > 0,
        f"fills a card to less than {least}": row["occupancy"] < least,
        "takes more instructions than plans count": instructions(row) > planned_instructions(row),
    }
    name = f"{row['kernel']} of {row['call']} on {row['card']}"
    return [f"{name}: {complaint}" for complaint, holds in found.items() if holds]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_are_compiled_to_wide_loads_few_registers_and_no_spills():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--json", "--cards", *CALLS, "--only", *CALLS.values()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["card"] for row in rows} == set(CALLS)
    assert not [complaint for row in rows for complaint in complaints(row)]
