# SPDX-License-Identifier: Apache-2.0
"""The integration with transformers: configuration, quantizer, and everything that differs between its versions."""
