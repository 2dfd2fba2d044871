"""Which IP addresses are of the public internet: our own list, so that it does not change with Python's version.

From IANA's registries of special-purpose addresses for IPv4 and IPv6, those included that are reachable from elsewhere
but hold no web pages (AS112, AMT). An IPv6 address that carries an IPv4 address is judged by that one.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

REFUSED_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by a provider's customers
            "127.0.0.0/8",  # this machine
            "169.254.0.0/16",  # link-local; metadata of clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # IETF protocol assignments
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # relays of 6to4
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
"""All that IANA gives out. Outside of it are this machine, unique local, link-local, site-local and multicast."""
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

# Where the IPv4 address stands within an IPv6 address: bits to its right.
_CARRIERS = {
    IPv6Network("::ffff:0:0/96"): 0,  # IPv4-mapped
    IPv6Network("64:ff9b::/96"): 0,  # NAT64; that for local use, 64:ff9b:1::/48, is not global unicast
    IPv6Network("2002::/16"): 80,  # 6to4
}


def is_public(address: str) -> bool:
    """Whether an IP address, and the IPv4 address that it may carry, is one of the public internet."""
    try:
        ip = ip_address(address.partition("%")[0])  # without the interface of a link-local one
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        for carrier, shift in _CARRIERS.items():
            if ip in carrier:
                return _is_public_ipv4(IPv4Address(int(ip) >> shift & 0xFFFF_FFFF))
        return ip in GLOBAL_UNICAST and not any(ip in network for network in REFUSED_IPV6)
    return _is_public_ipv4(ip)


def _is_public_ipv4(ip: IPv4Address) -> bool:
    return not any(ip in network for network in REFUSED_IPV4)
