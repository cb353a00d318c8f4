//! Writes an OCI image layout (image-spec: image-layout.md, manifest.md, config.md) as one tar for `ctr images import`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::hex;

/// The configuration of an image.
pub struct Config<'a> {
    pub env: &'a [&'a str],
    pub cmd: &'a [&'a str],
    pub working_dir: &'a str,
}

/// A blob's descriptor: digest and size.
struct Blob {
    digest: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", self.digest), "size": self.size })
    }
}

/// Writes an image with the name `reference` to `out`. `layers` are uncompressed tar files, the lowest layer first.
///
/// Layers stay uncompressed, because an emulated node unpacks them several times faster than compressed layers.
pub fn write(out: &Path, reference: &str, config: &Config, layers: &[&Path]) -> Result<()> {
    let file = File::create(out).with_context(|| format!("failed to create {}", out.display()))?;
    let mut tar = Builder::new(BufWriter::new(file));
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    for layer in layers {
        let blob = add_file(&mut tar, layer).with_context(|| format!("failed to add layer {}", layer.display()))?;
        // The diff_id of an uncompressed layer is the digest of its tar.
        diff_ids.push(format!("sha256:{}", blob.digest));
        descriptors.push(blob.descriptor("application/vnd.oci.image.layer.v1.tar"));
    }
    let image = json!({
        "created": "2024-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": config.env, "Cmd": config.cmd, "WorkingDir": config.working_dir },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let image = add_json(&mut tar, &image)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": descriptors,
    });
    let manifest = add_json(&mut tar, &manifest)?;
    let mut entry = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    let tag = reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    // containerd takes the whole name from its own annotation. Other tools take the tag from the annotation that the
    // specification defines.
    entry["annotations"] = json!({ "io.containerd.image.name": reference, "org.opencontainers.image.ref.name": tag });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    add(&mut tar, "oci-layout", &serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?)?;
    add(&mut tar, "index.json", &serde_json::to_vec(&index)?)?;
    tar.into_inner()?.flush()?;
    Ok(())
}

fn add_json(tar: &mut Builder<impl Write>, value: &Value) -> Result<Blob> {
    let bytes = serde_json::to_vec(value)?;
    let digest = hex(&Sha256::digest(&bytes));
    add(tar, &format!("blobs/sha256/{digest}"), &bytes)?;
    Ok(Blob { digest, size: bytes.len() as u64 })
}

fn add_file(tar: &mut Builder<impl Write>, path: &Path) -> Result<Blob> {
    let mut hasher = HashWriter(Sha256::new());
    let size = io::copy(&mut BufReader::new(File::open(path)?), &mut hasher)?;
    let digest = hex(&hasher.0.finalize());
    let mut header = header(size);
    tar.append_data(&mut header, format!("blobs/sha256/{digest}"), BufReader::new(File::open(path)?))?;
    Ok(Blob { digest, size })
}

fn add(tar: &mut Builder<impl Write>, name: &str, bytes: &[u8]) -> Result<()> {
    Ok(tar.append_data(&mut header(bytes.len() as u64), name, bytes)?)
}

fn header(size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    header
}

/// A writer that hashes its input.
struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
