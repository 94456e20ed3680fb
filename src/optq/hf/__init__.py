# SPDX-License-Identifier: Apache-2.0
"""What transformers calls: the quantizer, and what reads, splits and prepares a model for it."""
