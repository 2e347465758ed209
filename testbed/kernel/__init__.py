"""The only code that changes kernel network state and runs tools: namespaces, links, rules, sysctls, file systems."""
