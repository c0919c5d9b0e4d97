"""The meaning of packing, in plain torch. Shapes: R rows, C values of a row, P bytes of a row.

A row of C values of b bits fills P = ceil(C b / 8) bytes, the first value in the lowest bits; unused bits are zero. So
any row, and any slice of rows, is a plain slice of the packed tensor.
"""

import torch
from torch import Tensor

# The integer type whose numbers are the bit patterns of a type of so many bytes.
PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(values_RC: Tensor, bits: int) -> Tensor:
    """[R, C] uint8 in 0 .. 2**bits - 1 -> [R, P] uint8."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(values_RC, (0, -values_RC.shape[1] % per_byte))
    shifts = bits * torch.arange(per_byte, device=values_RC.device)
    return (padded.view(len(values_RC), -1, per_byte).int() << shifts).sum(-1).to(torch.uint8)


def unpack(packed_RP: Tensor, out_RC: Tensor, bits: int) -> None:
    """Fill `out_RC`, of any dtype, with the values of `packed_RP`."""
    shifts = bits * torch.arange(8 // bits, device=packed_RP.device)
    values = (packed_RP.unsqueeze(-1).int() >> shifts) & (2**bits - 1)
    out_RC.copy_(values.flatten(1)[:, : out_RC.shape[1]])
