"""The volume of a claim that an image is made of."""

from typing import Protocol

from csi_driver.kube.kinds import CLAIM, VOLUME, Json, Kind, name_of, uid_of


class Reads(Protocol):
    """The call of `Kube` that is made here, with its errors."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None: ...


def volume_of(api: Reads, namespace: str, name: str) -> Json | str:
    """The PersistentVolume that is bound to a claim; or why there is none, in words.

    Whoever makes a claim may name any volume in it, somebody else's too: whose it is only the volume says.
    """
    claim = api.get(CLAIM, name, namespace)
    if claim is None:
        return f"there is no claim {namespace}/{name}"
    if not (volume_name := claim["spec"].get("volumeName")):
        return f"the claim {namespace}/{name} is not bound yet"
    volume = api.get(VOLUME, volume_name)
    owner = {} if volume is None else volume["spec"].get("claimRef") or {}
    wanted = {"namespace": namespace, "name": name_of(claim), "uid": uid_of(claim)}
    if volume is None or any(owner.get(key) != value for key, value in wanted.items()):
        return f"the claim {namespace}/{name} names the PersistentVolume {volume_name}, which is not bound to it"
    return volume
