# SPDX-License-Identifier: Apache-2.0
"""The report of finished, failed and running quantizations: a page with pictures, from the files that they left."""

from .next_steps import Step as Step
from .next_steps import next_steps as next_steps
from .page import Report as Report
from .page import report as report
from .run import Run as Run
from .run import notes_on as notes_on
from .run import read_run as read_run
