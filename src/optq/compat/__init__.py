# SPDX-License-Identifier: Apache-2.0
"""What we use of transformers beyond its public interface, and what `from_pretrained` was called with."""
