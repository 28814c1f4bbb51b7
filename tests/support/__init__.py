"""What tests are judged with."""
