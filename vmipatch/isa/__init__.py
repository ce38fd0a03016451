"""x86 bytes: decoding, assembling, nops and relative branches.  Imports errors and facts only."""
