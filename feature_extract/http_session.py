"""HTTP sessions, one a thread, that ask only addresses which anybody on the internet may ask.

URLs stand in the files of a corpus, and whoever wrote those must not be able to read what only this machine sees: a
cloud's metadata service, a router, a database of the local network. So an address is judged after its connection is
made and before anything is sent: redirects and names that change their address between two look-ups gain nothing.

Hosts named in the environment variable OPT_FETCH_HOSTS (`localhost,files.lan`) may have any address but a link-local
one, which is where metadata services are. Behind a proxy (HTTPS_PROXY) the proxy decides what it reaches; addresses
written as numbers are judged all the same.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

import opt

HOSTS_VARIABLE = "OPT_FETCH_HOSTS"
USER_AGENT = f"opt-omni/{opt.__version__} (pretraining data; python-requests/{requests.__version__})"

_local = threading.local()


class AddressRefused(Exception):
    """The host has an address that URLs of a corpus may not name."""


def session() -> requests.Session:
    """This thread's session: no cookies, no passwords of ~/.netrc, no decoding of compressed answers asked for."""
    if not hasattr(_local, "session"):
        _local.session = _session()
    kept: requests.Session = _local.session
    return kept


def _session() -> requests.Session:
    made = requests.Session()
    made.headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}  # type: ignore[assignment]
    made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    made.auth = lambda request: request  # anything set keeps requests from looking into ~/.netrc
    for scheme in ("http://", "https://"):
        made.mount(scheme, _PublicAdapter())
    return made


def _forget() -> None:
    _local.__dict__.clear()


os.register_at_fork(after_in_child=_forget)  # two processes must not share a connection


def judge(host: str, address: str) -> None:
    """Raise AddressRefused unless `address`, which `host` has, may be asked."""
    number = ipaddress.ip_address(address.split("%")[0])
    number = getattr(number, "ipv4_mapped", None) or number
    if number.is_link_local:
        raise AddressRefused("link-local, where cloud metadata is")
    named = [name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",")]
    if not number.is_global and host.lower() not in named:
        raise AddressRefused(f"not public; {HOSTS_VARIABLE} names the hosts that may be")


class _JudgedConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _judged(super()._new_conn(), self.host)


class _JudgedSecureConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _judged(super()._new_conn(), self.host)


def _judged(connected: socket.socket, host: str) -> socket.socket:
    try:
        judge(host, connected.getpeername()[0])
    except BaseException:
        connected.close()
        raise
    return connected


class _Pool(HTTPConnectionPool):
    ConnectionCls = _JudgedConnection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _JudgedSecureConnection


class _PublicAdapter(HTTPAdapter):
    """Direct connections are judged by the address they have; `send` judges those that a proxy would make."""

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def send(self, request: requests.PreparedRequest, *arguments: Any, **named: Any) -> requests.Response:
        host = urlsplit(request.url or "").hostname or ""
        try:
            ipaddress.ip_address(host)
        except ValueError:  # a name
            return super().send(request, *arguments, **named)
        judge(host, host)
        return super().send(request, *arguments, **named)
