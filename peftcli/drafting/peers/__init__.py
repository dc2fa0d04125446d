"""Other tools whose recipes ``peftcli import`` reads: one file each, and ``base`` for what they share."""

from __future__ import annotations

from peftcli.drafting.peers import axolotl, llama_factory, mlx_lm, ms_swift, torchtune, trl, unsloth
from peftcli.drafting.peers.base import COMMAND, Draft, Peer, Unknown

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER for module in (axolotl, llama_factory, trl, ms_swift, unsloth, torchtune, mlx_lm)
}
"""Name for ``--from`` -> the tool."""

__all__ = ["COMMAND", "PEERS", "Draft", "Peer", "Unknown"]
