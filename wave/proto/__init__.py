"""The protocol of administration. `admin_pb2` and `admin_pb2_grpc` are made of admin.proto when Wave is built or set up (setup.py), and not kept."""
