"""OpenELB's two programs: the controller, which gives Services addresses, and the speaker, which answers ARP for them.

Images kubesphere/openelb-controller and kubesphere/openelb-speaker run them. docs/openelb.md explains both.
"""
