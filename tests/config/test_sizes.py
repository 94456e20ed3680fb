# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from optq.config.sizes import bytes_of


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        ("8GiB", 2**33),
        ("8gb", 8 * 10**9),
        ("8192MiB", 2**33),
        ("1.5 TiB", 3 * 2**39),
        ("7B", 7),
        ("2kB", 2000),
        (5, 5),
        (np.int64(5), 5),
    ],
)
def test_a_size_is_bytes(size, bytes_):
    assert bytes_of(size) == bytes_


@pytest.mark.parametrize(
    "size", ["", "8", "8G", "-8GiB", "8 GiB of it", "nanGiB", "1e3GiB", "9" * 400 + "GB", True, -1, 1.5, None]
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="no size"):
        bytes_of(size)
