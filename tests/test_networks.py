"""Our own list decides for each address whether it is on the public internet."""

import ipaddress

import pytest

from arpo_trl.tools.visit.networks import GLOBAL_UNICAST, REFUSED_IPV4, REFUSED_IPV6, is_public

# IANA's registries of special-purpose addresses, with multicast and reserved ones: first and last address of each.
IPV4 = """
0.0.0.0 0.255.255.255     10.0.0.0 10.255.255.255     100.64.0.0 100.127.255.255     127.0.0.0 127.255.255.255
169.254.0.0 169.254.255.255     172.16.0.0 172.31.255.255     192.0.0.0 192.0.0.255     192.0.0.7 192.0.0.8
192.0.0.9 192.0.0.10     192.0.0.170 192.0.0.171     192.0.2.0 192.0.2.255     192.31.196.0 192.31.196.255
192.52.193.0 192.52.193.255     192.88.99.0 192.88.99.255     192.168.0.0 192.168.255.255
192.175.48.0 192.175.48.255     198.18.0.0 198.19.255.255     198.51.100.0 198.51.100.255
203.0.113.0 203.0.113.255     224.0.0.0 239.255.255.255     240.0.0.0 255.255.255.255
""".split()
IPV6 = """
:: ::1     ::2 ::ffff     64:ff9b:1:: 64:ff9b:1:ffff:ffff:ffff:ffff:ffff     100:: 100::ffff:ffff:ffff:ffff
100:0:0:1:: 100:0:0:1:ffff:ffff:ffff:ffff     2001:: 2001:0:ffff:ffff:ffff:ffff:ffff:ffff
2001:1::1 2001:1::3     2001:2:: 2001:2:0:ffff:ffff:ffff:ffff:ffff     2001:3:: 2001:3:ffff:ffff:ffff:ffff:ffff:ffff
2001:4:112:: 2001:4:112:ffff:ffff:ffff:ffff:ffff     2001:10:: 2001:1f:ffff:ffff:ffff:ffff:ffff:ffff
2001:20:: 2001:2f:ffff:ffff:ffff:ffff:ffff:ffff     2001:30:: 2001:3f:ffff:ffff:ffff:ffff:ffff:ffff
2001:db8:: 2001:db8:ffff:ffff:ffff:ffff:ffff:ffff     2620:4f:8000:: 2620:4f:8000:ffff:ffff:ffff:ffff:ffff
3fff:: 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff     5f00:: 5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff
fc00:: fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff     fe80:: febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff
fec0:: feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff     ff00:: ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
""".split()


@pytest.mark.parametrize("address", [*IPV4, *IPV6])
def test_the_first_and_the_last_address_of_a_special_network_are_refused(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    """1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 169.255.0.0
    172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.1.255 192.0.3.0 192.31.195.255 192.31.197.0
    192.52.192.255 192.52.194.0 192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 192.175.47.255 192.175.49.0
    198.17.255.255
    198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255 8.8.8.8
    2000:: 2001:200:: 2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db9:: 2620:4f:7fff:: 2620:4f:8001::
    3ffe:: 3fff:1000:: 2001:4860:4860::8888 2606:4700::1111""".split(),
)
def test_the_neighbours_of_special_networks_are_public(address):
    assert is_public(address)


def carried_by(address: str) -> list[str]:
    """The IPv6 addresses that stand for an IPv4 address: IPv4-mapped, NAT64, 6to4."""
    number = int(ipaddress.IPv4Address(address))
    mapped, nat64, sixtofour = (int(ipaddress.IPv6Address(text)) for text in ("::ffff:0:0", "64:ff9b::", "2002::1"))
    return [str(ipaddress.IPv6Address(each)) for each in (mapped | number, nat64 | number, sixtofour | number << 80)]


@pytest.mark.parametrize("address", IPV4)
def test_an_address_that_embeds_a_special_one_is_refused(address):
    assert [is_public(carrier) for carrier in carried_by(address)] == [False] * 3


def test_an_address_that_carries_a_public_one_is_public():
    texts = "::ffff:808:808", "64:ff9b::808:808", "2002:808:808::1"
    assert carried_by("8.8.8.8") == [
        str(ipaddress.IPv6Address(text)) for text in texts
    ]  # Python 3.13 writes ::ffff:8.8.8.8
    assert all(map(is_public, carried_by("8.8.8.8")))


@pytest.mark.parametrize(
    "address",
    [
        *("::8.8.8.8", "::127.0.0.1", "::ffff:0:808:808", "64:ff9b:1::808:808", "2001:0:808:808::f7f7:f7f7"),
        *("fe80::1%eth0", "8.8.8", "8.8.8.8.8", "010.0.0.1", "0x7f000001", "2130706433", "localhost", "", " 8.8.8.8"),
        "\uff18.8.8.8",  # a full-width 8
    ],
)
def test_deprecated_embeddings_and_invalid_addresses_are_refused(address):
    """IPv4-compatible, SIIT, local NAT64 and Teredo are refused even where they carry a public address."""
    assert not is_public(address)


def test_the_list_asks_nothing_of_pythons_own():
    """Of which 192.0.0.0/24 is public before 3.11.4 or so, and 3fff::/20 before 3.13."""
    refused = [*map(str, REFUSED_IPV4), *map(str, REFUSED_IPV6)]
    assert {"192.0.0.0/24", "3fff::/20"} <= set(refused) and len(refused) == 18 + 4
    assert str(GLOBAL_UNICAST) == "2000::/3"
