//! A password or key in memory: never printed, never compared by accident, wiped when it goes. It does not keep the operating
//! system from writing memory to disk.

use std::fmt;

use zeroize::Zeroizing;

/// A secret. Printing it shows that there is one and nothing else; dropping it overwrites it with zeroes.
///
/// ```
/// use podnet::types::Secret;
/// let secret = Secret::from("hunter2".to_owned());
/// assert_eq!(format!("{secret:?}"), "Secret(..)");
/// ```
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// The secret itself. Whoever asks for it takes care where it goes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Secret {
    fn from(bytes: Vec<u8>) -> Self {
        Secret(Zeroizing::new(bytes))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}
