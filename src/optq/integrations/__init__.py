# SPDX-License-Identifier: Apache-2.0
"""What other libraries want of a packed linear: tensor parallelism and PEFT."""
