"""Connections to other machines: those that exist fail after a minute of silence."""

from __future__ import annotations

import socket
import sys

import pytest

from peftcli.system.addresses import notice_lost_machines


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are Linux's")
@pytest.mark.parametrize("unanswered", [True, False])
def test_silence_is_noticed_on_connections_to_other_addresses(unanswered: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = server.getsockname()
        other = socket.create_connection(there, source_address=("127.0.0.3", 0))
        own = socket.create_connection(there, source_address=("127.0.0.1", 0))
        with other, own:
            notice_lost_machines(unanswered=unanswered)
            kept = [each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in (other, own)]
            assert kept == [1, 0]
            taken = other.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert taken == (60_000 if unanswered else 0)
