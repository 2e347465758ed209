"""The lab's nodes, outside hosts, pods' network namespaces and LANs, as Mininet hosts, switches and links.

The only importer of mininet. Mininet's own ways of making things (a shell per host, typed commands) are replaced behind
its API: namespaces are held by a forked process, links and addresses go through netlink, a shell starts on first use.
"""
