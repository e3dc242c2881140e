"""What backbones and rewards share of vision networks: pictures made ready for one, and a frozen one."""
