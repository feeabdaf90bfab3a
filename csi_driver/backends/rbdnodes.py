"""Which node has a volume, written down beside its image; and that a node which lost it writes nothing any more.

A node maps each image by a client of its own (`noshare`), and writes that client's address down before the device is
used. A node that let go of the device takes the address back. So an address that is left may still write, and it alone:
it is put on the cluster's blocklist before anybody else gets the volume, which hits no other volume of that node.
"""

import contextlib
from collections.abc import Callable, Sequence

import msgspec

from csi_driver.backends.rbderrors import CephMissing
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import Attachment, VolumeLogs, VolumeState
from csi_driver.host.log import log
from csi_driver.model.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound

Fence = Callable[[CephPool, str, str], None]
"""Keeps a client, by its address, from writing to an image, by its name, or to anything else of the cluster."""


def fence_off(pool: CephPool, image: str, client: str) -> None:
    """By the cluster's blocklist; the image's lock goes too, which its next owner would wait for."""
    pool.fence(image, client)


class NodeAttachments:
    """Gives volumes to nodes and takes them away, for the node `node_id` or for all from a controller."""

    def __init__(self, logs: VolumeLogs, node_id: str, boot: str, fence: Fence = fence_off) -> None:
        self._logs = logs
        self.node_id = node_id
        self._boot = boot
        self._fence = fence

    def give(self, pool: CephPool, volume_id: str, node_id: str, *, many_nodes: bool) -> None:
        """Let the node have it. Raises NotFound, AlreadyExists, Aborted, FailedPrecondition naming who has it."""
        self.take_from_commands(pool, volume_id, node_id)

        def give(state: VolumeState | None) -> VolumeState:
            state = whole(volume_id, state)
            for other, attachment in state.nodes.items():
                if other != node_id and not (many_nodes and attachment.many_nodes):
                    raise FailedPrecondition(
                        f"volume {volume_id} cannot be given to node {node_id}: node {other} has it; it is given to "
                        f"one node at a time, end what uses it there"
                    )
            mine = state.nodes.get(node_id) or Attachment(many_nodes=many_nodes)
            if not mine.by_itself and mine.many_nodes != many_nodes:
                raise AlreadyExists(
                    f"volume {volume_id} was given to node {node_id} for {_ways(mine.many_nodes)} and is asked for "
                    f"{_ways(many_nodes)}; take it away from there first"
                )
            mine = msgspec.structs.replace(mine, many_nodes=many_nodes, by_itself=False)
            return msgspec.structs.replace(state, nodes={**state.nodes, node_id: mine})

        self._logs.change(pool, volume_id, give)

    def take(self, pool: CephPool, volume_id: str, node_id: str) -> None:
        """Take it from the node, "" from all; who may still write is fenced off before. Absent is fine."""
        state = self._logs.state(pool, volume_id)
        for node in list(state.nodes) if state is not None else ():
            if node_id in ("", node):
                self._take(pool, volume_id, node)

    def mine(self, volume_id: str, state: VolumeState) -> Attachment:
        """How this node has it; by itself where nobody has it. Raises FailedPrecondition where others have."""
        mine = state.nodes.get(self.node_id)
        if mine is None and state.nodes:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be attached to node {self.node_id}: it was given to "
                f"{', '.join(sorted(state.nodes))} (ControllerPublishVolume); end what uses it there"
            )
        return mine or Attachment(by_itself=True)

    def fence_earlier_boot(self, pool: CephPool, volume_id: str, mine: Attachment) -> None:
        """What this node had mapped before it booted writes nothing, but its lock would be waited for."""
        if mine.client is not None and mine.boot != self._boot:
            self._fence(pool, image_name(volume_id), mine.client)

    def refuse_others(self, pool: CephPool, volume_id: str, client: str) -> None:
        """Raise Aborted where anybody but that client has the image open."""
        image = image_name(volume_id)
        if others := [address for address in pool.watchers(image) if address != client]:
            raise Aborted(
                f"volume {volume_id} is not attached: its image {pool.place.spec}/{image} is open at "
                f"{', '.join(others)} too; call again when that has ended, a client that crashed is gone after 30 s"
            )

    def may_write(self, pool: CephPool, volume_id: str, client: str, before: Attachment) -> None:
        """Write down by which client this node writes, before it does. It had the volume as `before` says.

        Raises as `mine`, and Aborted where it was taken from this node since.
        """

        def say(state: VolumeState | None) -> VolumeState:
            state = whole(volume_id, state)
            found = self.mine(volume_id, state)
            if found.by_itself and not before.by_itself:
                raise Aborted(
                    f"volume {volume_id} was taken from node {self.node_id} (ControllerUnpublishVolume) while it was "
                    f"being attached; call again when it has been given to it"
                )
            mine = msgspec.structs.replace(found, client=client, boot=self._boot)
            return msgspec.structs.replace(state, nodes={**state.nodes, self.node_id: mine})

        self._logs.change(pool, volume_id, say)

    def refuse_fenced(self, volume_id: str, state: VolumeState, device: str, client: str) -> None:
        """Raise FailedPrecondition where that client of this node's, which has the device, may not write any more: the
        volume was taken from the node, and given to it again perhaps.
        """
        mine = state.nodes.get(self.node_id)
        if mine is None or mine.client != client:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be used on node {self.node_id} by {device}: the volume was taken from the "
                f"node while it was open there, and the client {client} was fenced off; end what uses it there, it is "
                f"mapped anew when it was unstaged"
            )

    def writes_no_more(self, pool: CephPool, volume_id: str) -> None:
        """Take that back, once its device is gone."""

        def say(state: VolumeState | None) -> VolumeState:
            if state is None:
                raise NotFound(f"volume {volume_id} is gone")
            mine = state.nodes.get(self.node_id)
            if mine is None or mine.client is None:
                return state
            nodes = {node: how for node, how in state.nodes.items() if node != self.node_id}
            if not mine.by_itself:
                nodes[self.node_id] = msgspec.structs.replace(mine, client=None, boot=None)
            return msgspec.structs.replace(state, nodes=nodes)

        with contextlib.suppress(NotFound):
            self._logs.change(pool, volume_id, say)

    def take_from_commands(self, pool: CephPool, volume_id: str, node_id: str = "") -> VolumeState:
        """What an administrator's command left on another node hinders nobody, unless it still has the image mapped.

        Raises Aborted then.
        """
        state = whole(volume_id, self._logs.state(pool, volume_id))
        left = {node: how for node, how in state.nodes.items() if how.by_itself and node != node_id}
        for node, attachment in left.items():
            watchers: Sequence[str] = ()
            with contextlib.suppress(CephMissing):  # nobody has an image open that somebody has removed
                watchers = pool.watchers(image_name(volume_id))
            if attachment.client in watchers:
                raise Aborted(
                    f"volume {volume_id} is not free now: a command on node {node} is at work on it, or was killed "
                    f"there; call again when that has ended, or end it by the same command, once more"
                )
            self._take(pool, volume_id, node)
        return whole(volume_id, self._logs.state(pool, volume_id)) if left else state

    def _take(self, pool: CephPool, volume_id: str, node: str) -> None:
        fenced: set[str] = set()
        unfenced: list[str] = []

        def take(state: VolumeState | None) -> VolumeState:
            if state is None:
                raise NotFound(f"volume {volume_id} is gone")
            attachment = state.nodes.get(node)
            client = attachment.client if attachment is not None else None
            unfenced[:] = [client] if client is not None and client not in fenced else []
            if unfenced:
                return state  # not before it is fenced off; it may be another one by then
            return msgspec.structs.replace(state, nodes={one: how for one, how in state.nodes.items() if one != node})

        self._logs.change(pool, volume_id, take)
        while unfenced:
            self._fence(pool, image_name(volume_id), unfenced[0])
            fenced.add(unfenced[0])
            log.warning("a node that did not let go of a volume was fenced off", volume_id=volume_id, node=node)
            self._logs.change(pool, volume_id, take)


def whole(volume_id: str, state: VolumeState | None) -> VolumeState:
    """The state of a volume that was made to its end. Raises NotFound for any other."""
    if state is None or state.record is None:
        raise NotFound(f"volume {volume_id} does not exist in its pool")
    return state


def _ways(many_nodes: bool) -> str:  # noqa: FBT001 - what it is about
    return "several nodes" if many_nodes else "one node alone"
