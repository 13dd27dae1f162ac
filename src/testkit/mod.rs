//! What tests of podnet, of embedders and of third-party backends stand on. Not for production.
//!
//! - [`FakeKernel`](kernel::FakeKernel): a kernel with state and faults, behind the same [`Driver`](crate::driver::Driver)
//!   trait as the real one.
//! - [`ManualClock`](manual_clock::ManualClock): time that stands until a test moves it.
//! - [`conformance`]: suites that say whether a backend, a driver or a store of leases keeps to what podnet relies on.
//! - `MockOverlay`, `MockSubnetManager`: mockall mocks, for tests of code that calls podnet.
//!
//! ```
//! # #[cfg(feature = "testkit")]
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use podnet::testkit::MockOverlay;
//! use podnet::{Error, Overlay};
//!
//! let mut overlay = MockOverlay::new();
//! overlay.expect_lease().returning(|| Err(Error::NotReady { reason: "no podCIDR yet".into() }));
//! assert!(overlay.lease().await.unwrap_err().is_retryable());
//! # }
//! # #[cfg(not(feature = "testkit"))] fn main() {}
//! ```

pub mod conformance;
pub mod kernel;
pub mod manual_clock;

#[cfg(feature = "testkit")]
pub use crate::overlay::MockOverlay;
#[cfg(feature = "testkit")]
pub use crate::subnet::MockSubnetManager;
