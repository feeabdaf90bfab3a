"""`python -m tests.operator.plants PLANT OPTION…`: operator or agent with a bug in it, or an end at a chosen moment.

Each bug must turn `make operator-random` red (test_random.py). PLANT:COUNT is for those that count.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from csi_driver.agent.run import NodeAgent
from csi_driver.agent.settings import AgentSettings
from csi_driver.cli.image_agent import image_agent
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.operator import operator
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import IMAGE_COPY, Json, Kind
from csi_driver.operator.run import Operator
from csi_driver.operator.settings import OperatorSettings
from csi_driver.rpc.signals import told_to_stop


def program(plant: str) -> list[str]:
    """The command that runs it; options follow."""
    return [sys.executable, "-m", "tests.operator.plants", plant]


class KeepingLibrary(ImageLibrary):
    """Removes nothing."""

    def drop(self, name: str, owner: str) -> None:
        """Leave it."""


class ForgetfulKube(Kube):
    """Lets one copy of an image be made, and no other one."""

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json:
        if kind == IMAGE_COPY and not thing["spec"]["make"]:
            return thing
        return super().create(kind, thing, namespace, dry_run=dry_run)


class HastyKube(Kube):
    """Lets go of copies whose files are there."""

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        if kind == IMAGE_COPY:
            self.patch(kind, name, {"metadata": {"finalizers": None}})
        super().delete(kind, name, namespace)


class MortalKube(Kube):
    """Ends the process behind its COUNTth write."""

    left = 0

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json:
        return self._done(lambda: super(MortalKube, self).create(kind, thing, namespace, dry_run=dry_run))

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        return self._done(lambda: super(MortalKube, self).patch(kind, name, patch, namespace, status=status))

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        def delete() -> Json:
            super(MortalKube, self).delete(kind, name, namespace, seen=seen)
            return {}

        self._done(delete)

    def _done(self, write: Callable[[], Json]) -> Json:
        done = write()
        MortalKube.left -= 1
        if not MortalKube.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return done


_KUBES: Final[Mapping[str, type[Kube]]] = {"forgets": ForgetfulKube, "hasty": HastyKube, "mortal": MortalKube}


def main(plant: str, arguments: list[str]) -> None:
    """Run it until SIGTERM."""
    name, _, count = plant.partition(":")
    options = _options(image_agent if name == "keeps" else operator, arguments)
    configure_logs(options.pop("log_format"), options.pop("log_level"))
    running: Operator | NodeAgent
    if name == "keeps":
        settings = AgentSettings(node=options.pop("node_id"), **options)
        running = NodeAgent(Kube.of(), settings, KeepingLibrary(settings.images))
    else:
        MortalKube.left = int(count or 0)
        for each in ("http_address", "webhook_listen", "profile"):
            del options[each]  # no part of what is planted here
        running = Operator(_KUBES[name].of(Path(os.environ["KUBECONFIG"])), OperatorSettings(**options))
    with told_to_stop() as (told, _):
        running.start()
        os.read(told, 1)
    running.stop()


def _options(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    with command.make_context("plant", arguments) as context:
        return dict(context.params)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
