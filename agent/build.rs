//! Links the agent at a fixed address if it is static, as the agent of the guest is.
//!
//! A position-independent program would apply some 17,000 relocations at each start. This would copy 75 pages in the
//! agent and in each helper that it starts, which all guests of a template can share otherwise.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        // rustc passes -static-pie. The last of these options counts.
        println!("cargo::rustc-link-arg-bins=-static");
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
