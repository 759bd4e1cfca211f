"""The network on one machine: client, IPU and host as network namespaces; steering by AF_XDP or by SO_REUSEPORT; services to steer to."""
