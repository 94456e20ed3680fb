# SPDX-License-Identifier: Apache-2.0
"""What the machine can do: memory, where models are placed, and where Triton runs."""
