# SPDX-License-Identifier: Apache-2.0
"""What optimum-cli finds: `export gptq` and the group `gptq`. The folders above have no __init__.py, by its rules."""

import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from optq.cli import COMMANDS, EXPORT, Command, execute


def as_optimum_command(command: Command) -> type[BaseOptimumCLICommand]:
    """A class of optimum's own kind around one of our commands."""

    def run(self: BaseOptimumCLICommand) -> None:
        sys.exit(execute(command, self.args))

    return type(
        f"{command.name.capitalize()}GPTQCommand",
        (BaseOptimumCLICommand,),
        {
            "COMMAND": CommandInfo(name=command.name, help=command.summary),
            "parse_args": staticmethod(command.declare),
            "run": run,
        },
    )


class GPTQCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="gptq", help="Plan, inspect, judge and compare GPTQ checkpoints.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.name, help=command.summary, subcommand_class=as_optimum_command(command))
        for command in COMMANDS
    )


REGISTER_COMMANDS = [(as_optimum_command(EXPORT), ExportCommand), GPTQCommand]
