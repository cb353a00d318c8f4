//! FUSE constants and encoding for tests of virtio-fs (include/uapi/linux/fuse.h).

// enum fuse_opcode
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const GETLK: u32 = 31;
pub const SETLK: u32 = 32;
pub const SETLKW: u32 = 33;
pub const ACCESS: u32 = 34;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
/// FUSE_ROOT_ID.
pub const ROOT: u64 = 1;

/// Names that are not entries of the directory in which the tests look them up. As paths, the names refer to files in
/// the tests' directory trees. Some of these files are in the share (`file`, `dir/inner`, the symlinks `out`, `outfile`
/// and `absolute`). Others are outside of the share (`../outside`, `../../far`).
pub const HOSTILE_NAMES: [&str; 31] = [
    "",
    ".",
    "..",
    "/",
    "//",
    "../",
    "./",
    "file/",
    "dir/",
    "hollow/",
    "new/",
    "./file",
    "a/b",
    "dir/inner",
    "dir/new",
    "../outside",
    "../empty",
    "../new",
    "../full/inner",
    "../../far",
    "../../x",
    "dir/../../outside",
    "dir/../../empty",
    "dir/../../new",
    "out/outside",
    "out/empty",
    "out/new",
    "absolute/inner",
    "absolute/new",
    "outfile/",
    "../share",
];

/// Encodes 32-bit fields.
pub fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Encodes 64-bit fields.
pub fn longs<const N: usize>(longs: [u64; N]) -> Vec<u8> {
    longs.into_iter().flat_map(u64::to_le_bytes).collect()
}
