//! The lab: hosts, pods and wires made of network namespaces. See the module documentation.
