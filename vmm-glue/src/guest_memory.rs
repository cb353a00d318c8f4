//! The types of guest memory, which the boot code, the memory setup and the devices share.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

/// Guest memory, in the type that virtiofsd's readers and writers require.
pub type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// One region of guest memory.
pub type Region = GuestRegionMmap<BitmapMmapRegion>;
