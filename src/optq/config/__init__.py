# SPDX-License-Identifier: Apache-2.0
"""`GPTQConfig`, and whether what a checkpoint says of itself is true."""
