"""Decides which IP addresses are public. It has its own list, so that the result does not depend on the Python
version.

The list comes from IANA's registries of special-purpose addresses for IPv4 and IPv6. It also has reachable networks
without web pages (AS112, AMT). If an IPv6 address embeds an IPv4 address, the IPv4 address decides.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

REFUSED_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier-grade NAT
            "127.0.0.0/8",  # this machine
            "169.254.0.0/16",  # link-local; cloud metadata services
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # IETF protocol assignments
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All addresses that IANA assigns. Loopback, unique local, link-local, site-local and multicast are outside this
range."""
REFUSED_IPV6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, AMT, AS112, ORCHID, drones
            "2001:db8::/32",  # documentation
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)

# The number of bits to the right of an IPv4 address that is embedded in an IPv6 address.
_EMBEDDING = {
    IPv6Network("::ffff:0:0/96"): 0,  # IPv4-mapped
    IPv6Network("64:ff9b::/96"): 0,  # NAT64; local-use NAT64, 64:ff9b:1::/48, is not global unicast
    IPv6Network("2002::/16"): 80,  # 6to4
}


def is_public(address: str) -> bool:
    """Return whether an IP address is public. If it embeds an IPv4 address, that one decides."""
    try:
        ip = ip_address(address.partition("%")[0])  # without the interface of a link-local address
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        for network, shift in _EMBEDDING.items():
            if ip in network:
                return _is_public_ipv4(IPv4Address(int(ip) >> shift & 0xFFFF_FFFF))
        return ip in GLOBAL_UNICAST and not any(ip in network for network in REFUSED_IPV6)
    return _is_public_ipv4(ip)


def _is_public_ipv4(ip: IPv4Address) -> bool:
    return not any(ip in network for network in REFUSED_IPV4)
