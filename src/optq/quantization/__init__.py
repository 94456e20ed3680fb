# SPDX-License-Identifier: Apache-2.0
"""From a model and a plan to quantized linears: the walk through the blocks, and the work on each."""
